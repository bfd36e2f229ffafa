"""DAttention against tensors made by running the published module in float64.

Parameters and inputs of the cases are exact in float32; output, pos, reference and the gradients
are float64.
"""

import pytest
import torch
from near import assert_near

from dat_cuda import DAttention

# Relative to a tensor's largest value. In float32 a result is a sum of hundreds of terms, each
# with the few roundings (6e-8) of the layers before it, and positions are scaled by the map's size.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def build(config):
    sides = tuple(side // config["stride"] for side in config["q_size"])
    return DAttention(kv_size=sides, attn_drop=0.0, proj_drop=0.0, **config)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_case(backend, dattention_case, dtype):
    case, tolerance = dattention_case, TOLERANCE[dtype]
    module = build(case["config"])
    module.load_state_dict(case["state_dict"], strict=True)
    module.to(dtype)
    x = case["input"].to(dtype).requires_grad_()
    y, pos, reference = module(x)
    y.backward(case["grad_output"].to(dtype))

    for name, tensor in (("output", y), ("pos", pos), ("reference", reference)):
        assert tensor.shape == case[name].shape and tensor.dtype == dtype
        assert_near(name, tensor.detach(), case[name], tolerance)
    assert_near("grad_input", x.grad, case["grad_input"], tolerance)

    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert grads.keys() == case["grad_params"].keys()
    for name, grad in grads.items():
        scale = None
        if name == "proj_k.bias":
            # Softmax ignores what is added to all keys: this gradient is zero but for rounding.
            scale = case["grad_params"]["proj_k.weight"].abs().max().item()
        assert_near(name, grad, case["grad_params"][name], tolerance, scale)


def test_state_dict_keys_and_order(dattention_case):
    assert list(build(dattention_case["config"]).state_dict()) == list(
        dattention_case["state_dict"]
    )
