"""What the operators and the layers around them need of autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run_below_autograd(f: Callable, *args: Any) -> Any:
    """f(*args); in eager mode without gradients to record, past all autograd.

    That of registered operators is Python, and took a fifth of all that a training step spends
    outside the kernels. And results that are views of what f made are not known as such, so that
    users may change in place what a Function returns.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return f(*args)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return f(*args)


def no_second_derivative(ctx: Any, *grads: Tensor) -> tuple:
    """The backward of what has no derivative."""
    raise RuntimeError(
        "dat_cuda has no second derivatives; for those, compute inside "
        "`with dat_cuda.backend('reference'):`"
    )


class _Refusal(torch.autograd.Function):
    """The first of the tensors as they are, which cannot be differentiated in any of them."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple:
        return tuple(t.view_as(t) for t in tensors[:count])

    backward = staticmethod(no_second_derivative)


def first_derivative_only(backward: Callable) -> Callable:
    """The backward of an autograd.Function whose results refuse to be differentiated in what comes
    in and what is saved, which must be all of the inputs that they depend on.

    torch's once_differentiable lets them pass as constants where autograd is asked for some inputs
    only, or where the gradient that comes in is a constant itself.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        made = [t for t in results if t is not None]
        causes = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        refused = iter(_Refusal.apply(len(made), *made, *causes))
        return tuple(t if t is None else next(refused) for t in results)

    return wrapper
