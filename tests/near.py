"""How near a result is to tensors of the published code."""


def assert_near(name, actual, expected, tolerance, scale=None):
    scale = expected.abs().max().item() if scale is None else scale
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * scale, f"{name}: error {error:.1e} at values up to {scale:.1e}"
