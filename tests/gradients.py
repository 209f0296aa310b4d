"""`assert_same_gradients`: equality of gradients that first proves that there is something to compare."""

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_RATIO_ERROR = 1e-4  # float32 sums in another order: about 1e-6 a sum, over some hundreds of them
MIN_COSINE = 0.99999


def assert_same_gradients(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Assert that both have the same names, that the expected gradients exist, are finite and not all zero, and that
    each pair has a ratio of norms within MAX_RATIO_ERROR of 1 and a cosine over MIN_COSINE.

    A gradient that is zero in both (to rounding, against the largest) has no direction and is left out of the cosine.
    """
    assert actual.keys() == expected.keys() and expected, "nothing to compare"
    norms = {name: float(g.double().norm()) for name, g in expected.items() if g is not None}
    assert norms.keys() == expected.keys(), f"no gradient for {sorted(expected.keys() - norms.keys())}"
    largest = max(norms.values())
    assert 0 < largest < float("inf"), "the expected gradients are zero or not finite"
    compared = 0
    for name, norm in norms.items():
        gradient = actual[name]
        assert gradient is not None and bool(gradient.isfinite().all()), f"{name} has no finite gradient"
        if norm < 1e-6 * largest:
            assert float(gradient.norm()) < 1e-5 * largest, f"{name} should have no gradient"
            continue
        compared += 1
        ratio = float(gradient.double().norm()) / norm
        assert abs(ratio - 1) <= MAX_RATIO_ERROR, f"{name}: ratio {ratio:.6f}"
        wanted = expected[name]
        assert wanted is not None
        cosine = torch.nn.functional.cosine_similarity(gradient.double().flatten(), wanted.double().flatten(), dim=0)
        assert float(cosine) > MIN_COSINE, f"{name}: cosine {float(cosine):.7f}"
    assert compared >= 0.5 * len(norms), "most gradients are zero: nothing was proved"


def gradients_of(**modules: torch.nn.Module) -> dict[str, Tensor | None]:
    """Return copies of the gradients of all trained parameters."""
    return {
        f"{prefix}.{name}": None if p.grad is None else p.grad.detach().clone()
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
