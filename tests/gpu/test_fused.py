"""The proofs of the soft-max of rows and its gradient again, by the kernels that Triton compiles for a GPU."""

import pytest
import torch

from gradcache.fused import can_fuse, plain_row_largest, plain_soft_max_gradient, row_largest, soft_max_gradient
from tests.gradcache.test_fused import (  # noqa: F401 - pytest collects them here, with the fixtures below
    FAR,
    Way,
    assert_far_is_right,
    assert_tiles_are_equal,
    evaluate_far,
    test_a_maximum_far_behind_or_far_ahead_is_found,
    test_a_row_of_masked_scores_gives_nothing_whatever_comes_back,
    test_gradients_may_take_the_place_of_scores,
    test_masked_scores_weigh_nothing_and_rows_of_them_get_no_gradient,
    test_no_rows_and_no_columns_are_allowed,
    test_tiles_may_be_slices_of_larger_memory,
    test_values_and_gradients_are_those_of_float64,
    test_weights_add_up_to_one_whatever_the_rounding_of_their_sum,
    test_what_is_not_a_number_is_not_hidden,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["plain", "compiled"])
def way(request):
    functions = {"plain": (plain_row_largest, plain_soft_max_gradient), "compiled": (row_largest, soft_max_gradient)}
    return Way(lambda fn, *args: fn(*args), *functions[request.param], device="cuda")


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def out_dtype(request):
    return request.param


def test_offsets_beyond_two_billion_scores_are_counted_on_a_gpu(way):
    assert_far_is_right(*evaluate_far(way.largest, way.gradient, torch.empty(FAR, device="cuda")))


def test_nothing_waits_for_a_gpu(way):
    scores, ones = torch.rand(600, 70_001, device="cuda"), torch.ones(600, device="cuda")
    scale, out = torch.tensor(20.0, device="cuda"), torch.empty_like(scores, dtype=torch.bfloat16)
    assert can_fuse(scores)  # compiled, before waiting is forbidden
    way.gradient(scores, scale, way.largest(scores, scale), ones, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        way.gradient(scores, scale, way.largest(scores, scale), ones, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.double(), (scores.double() * 20).softmax(1), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("trains_rows", [True, False])
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_tiles_give_by_kernels_what_they_give_by_torch_on_a_gpu(dtype, tolerance, phases, trains_rows):
    assert_tiles_are_equal(lambda fn, *args: fn(*args), "cuda", dtype, phases, trains_rows, tolerance)
