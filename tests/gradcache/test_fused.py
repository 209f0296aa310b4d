"""The log-sum-exp of rows and its gradient against float64: in plain torch, and by the kernels under Triton's interpreter.

`tests/gpu/test_fused.py` repeats these proofs with the kernels compiled.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradcache import InfoNCE, fused
from gradcache.fused import plain_row_largest, plain_soft_max_gradient, row_largest, soft_max_gradient
from gradcache.masks import Masks, Related
from gradcache.matrix import Matrix
from gradcache.objectives.tile import FLOOR
from gradcache.passes import ByKernel
from gradcache.soft_max import Largest
from gradcache.tiles import Tiles
from tests.triton import interpreted

SIZES = [(1, 1), (3, 7), (5, 1000), (2, 5000), (4, 4097)]


@dataclass(frozen=True)
class Way:
    """Where and how the two functions are called."""

    call: Callable[..., Any]
    largest: Callable[..., Largest] = row_largest
    gradient: Callable[..., torch.Tensor] = soft_max_gradient
    device: str = "cpu"


@pytest.fixture(scope="module")
def interpreter():
    """One process for this file."""
    with interpreted(__name__) as call:
        yield Way(call)


@pytest.fixture(params=["plain", "interpreted"])
def way(request):
    if request.param == "interpreted":
        return request.getfixturevalue("interpreter")
    return Way(lambda fn, *args: fn(*args), plain_row_largest, plain_soft_max_gradient)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def out_dtype(request):
    return request.param


def draw(way, *size):
    return draw_on(way.device, *size)


def draw_on(device, *size):
    return (torch.rand(size, generator=torch.Generator().manual_seed(sum(size))) * 2 - 1).to(device)


def evaluate(way, scores, scale, gradient, out):
    """Return the log-sum-exp and the gradient of the logits, float64."""
    scale = torch.tensor(scale, device=way.device)
    largest = way.call(way.largest, scores, scale)
    log_sum = largest.log_sum_exp()
    assert log_sum.dtype == torch.float32 and log_sum.shape == scores.shape[:1]
    found = way.call(way.gradient, scores, scale, largest, gradient, out)
    assert found is out or torch.equal(found.nan_to_num(), out.nan_to_num())  # another process gives back a view of the memory
    return log_sum.double(), out.double()


def assert_right(way, scores, scale, out):
    """Compare with float64, and its gradient by autograd."""
    gradient = draw(way, len(scores)) + 2
    logits = (scores.double() * torch.tensor(scale).double()).requires_grad_()
    wanted = torch.logsumexp(logits, 1)
    (wanted_gradient,) = torch.autograd.grad((wanted * gradient).sum(), logits)
    assert (wanted_gradient != 0).any()
    log_sum, found = evaluate(way, scores, scale, gradient, out)
    # float32 rounds a logit by half of this, and a weight is as wrong, relatively, as its logit is absolutely.
    error = 1.2e-7 * max(1, logits.abs().max().item())
    torch.testing.assert_close(log_sum, wanted.detach(), atol=4 * error, rtol=1e-6)
    least = 2**-24 if out.dtype == torch.float16 else 1e-37  # what the type holds near zero
    torch.testing.assert_close(found, wanted_gradient, atol=least, rtol=6 * error + torch.finfo(out.dtype).eps)


@pytest.mark.parametrize("scale", [1e-2, 20.0, 1e4])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_float64(way, out_dtype, size, scale):
    scores = draw(way, *size)
    assert_right(way, scores, scale, torch.empty_like(scores, dtype=out_dtype))


def test_a_maximum_far_behind_or_far_ahead_is_found(way, out_dtype):
    scores = draw(way, 3, 9000)
    scores[0, 0] = scores[1, 4096] = scores[2, -1] = 30
    assert_right(way, scores, 20.0, torch.empty_like(scores, dtype=out_dtype))


def test_tiles_may_be_slices_of_larger_memory(way, out_dtype):
    scores, out = draw(way, 5, 300), torch.full((6, 400), 7.0, dtype=out_dtype, device=way.device)
    assert_right(way, scores[1:4, 20:277], 20.0, out[2:5, 100:357])
    out[2:5, 100:357] = 7
    assert (out == 7).all()


def test_gradients_may_take_the_place_of_scores(way):
    scores = draw(way, 3, 5000)
    gradient, tile = draw(way, 3), scores.clone()
    _, wanted = evaluate(way, scores, 20.0, gradient, torch.empty_like(scores))
    _, found = evaluate(way, tile, 20.0, gradient, tile)
    assert torch.equal(found, wanted) and not torch.equal(tile, scores)


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e4])
def test_masked_scores_weigh_nothing_and_rows_of_them_get_no_gradient(way, out_dtype, scale):
    scores, gradient = draw(way, 4, 4100), draw(way, 4)
    masked = torch.zeros_like(scores, dtype=torch.bool)
    masked[0, ::2], masked[1, 4096:], masked[2:] = True, True, True
    masked[2, 4099] = False
    out = torch.full_like(scores, 7, dtype=out_dtype)
    log_sum, found = evaluate(way, scores.masked_fill(masked, FLOOR), scale, gradient, out)
    assert (found[masked] == 0).all() and (found[2, 4099] != 0) and (found[:2][~masked[:2]] != 0).any()
    logits = (scores * scale).double().masked_fill(masked, -torch.inf)
    torch.testing.assert_close(log_sum[:3], logits[:3].logsumexp(1), rtol=1e-6, atol=1e-6)
    assert log_sum[3] <= FLOOR * scale * 0.98  # the rest is the logarithm of 4,100 columns


def test_weights_add_up_to_one_whatever_the_rounding_of_their_sum(way):
    scores, ones = draw(way, 40, 5000), torch.ones(40, device=way.device)
    _, found = evaluate(way, scores, 20.0, ones, torch.empty_like(scores))
    # The log-sum-exp is near 25, whose rounding alone is 2^-20. What is left is that of sums in float32, which go by the lanes of
    # the processor: up to 4.3e-7 was seen.
    assert float((found.sum(1) - 1).abs().max()) < 2**-21


def test_a_row_of_masked_scores_gives_nothing_whatever_comes_back(way):
    scores, out = torch.full((2, 40), FLOOR, device=way.device), torch.full((2, 40), 7.0, device=way.device)
    scale, gradient = torch.tensor(20.0, device=way.device), torch.tensor([1.0, torch.inf], device=way.device)
    assert (way.call(way.gradient, scores, scale, way.call(way.largest, scores, scale), gradient, out) == 0).all()


def test_what_is_not_a_number_is_not_hidden(way):
    scores = draw(way, 2, 5000)
    scores[1, 4500] = torch.nan
    log_sum, found = evaluate(way, scores, 20.0, draw(way, 2), torch.empty_like(scores))
    assert log_sum[0].isfinite() and log_sum[1].isnan()
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("size", [(0, 5), (3, 0), (0, 0)])
def test_no_rows_and_no_columns_are_allowed(way, out_dtype, size):
    scores = draw(way, *size)
    log_sum, found = evaluate(way, scores, 20.0, draw(way, size[0]), torch.empty_like(scores, dtype=out_dtype))
    assert log_sum.tolist() == [FLOOR * 20] * size[0] and found.shape == size


FAR = 2 * 2**30 + 5  # float32 scores: 8 GiB


def evaluate_far(largest, gradient, memory):
    """Return the log-sum-exp and the gradients of three rows that are 2^30 scores apart: the last starts beyond an int32."""
    scores = memory.as_strided((3, 5), (2**30, 1))
    scores[:] = torch.arange(15.0).view(3, 5)
    scale = scores.new_tensor(1.0)
    found = largest(scores, scale)
    return found.log_sum_exp(), gradient(scores, scale, found, torch.ones_like(found.share_b), scores).clone()


def evaluate_file(path, *functions):
    return evaluate_far(*functions, torch.from_file(path, shared=True, size=FAR))


def assert_far_is_right(log_sum, found):
    wanted = torch.arange(15.0, dtype=torch.float64).view(3, 5)
    torch.testing.assert_close(log_sum.double().cpu(), wanted.logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double().cpu(), wanted.softmax(1), rtol=1e-5, atol=0)


def test_offsets_beyond_two_billion_scores_are_counted(way, tmp_path):
    # A file with a hole takes no memory and no disk.
    assert_far_is_right(*way.call(evaluate_file, str(tmp_path / "scores"), way.largest, way.gradient))


def evaluate_tiles(device, dtype, phases, trains_rows):
    """Return the statistics and gradients of 7 rows and 90 columns by torch and by kernels; row 5 has no negatives."""
    rows, columns = (torch.nn.functional.normalize(draw_on(device, n, 12), dim=1).to(dtype) for n in (7, 90))
    first, count = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 88])
    column = torch.tensor([4, 6, *(set(range(90)) - {8, 30})])
    repeated = torch.tensor([8, 30], device=device)
    starts = [np.array(values) for values in ([0, 1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 2, 2, 2, 90, 90])]
    related = Related(*(values.to(device) for values in (torch.tensor([0, 2, 5]), first, count, column)), repeated, *starts)
    matrix = Matrix(
        row_RD=rows,
        column_PD=columns,
        kind_P=torch.zeros(90, dtype=torch.int8, device=device),
        masks=Masks(repeated, [(0, related)]),
        scale=torch.tensor(20.0, device=device),
        positive_R=torch.zeros(7, device=device),
        trains_rows=trains_rows,
        num_trained_columns=80,
    )
    found = []
    for may_fuse in (False, True):
        tiles = Tiles(matrix, InfoNCE(), tile_rows=3, may_fuse=may_fuse)
        assert isinstance(tiles._pass, ByKernel) == may_fuse
        statistics = [tiles.statistics(keep_bytes=2000)[0]] if phases == 2 else []  # one tile is kept
        gradients = tiles.gradients(lambda rows, statistics: torch.sigmoid(statistics / 5) * (rows.start + 1))
        parts = (gradients.row_RD, gradients.column_PD, gradients.scale)
        found.append([part.detach().clone() for part in (*statistics, *parts) if part is not None])
    return found


def assert_tiles_are_equal(call, device, dtype, phases, trains_rows, tolerance):
    plain, fused_ones = call(evaluate_tiles, device, dtype, phases, trains_rows)
    assert len(plain) == len(fused_ones) == 2 + (phases == 2) + trains_rows
    for wanted, value in zip(plain, fused_ones, strict=True):
        assert (wanted != 0).any()
        largest = wanted[wanted > FLOOR].abs().max().item()  # row 5 has -2e7
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("trains_rows", [True, False])
@pytest.mark.parametrize("phases", [1, 2])
def test_tiles_give_by_kernels_what_they_give_by_torch(interpreter, phases, trains_rows):
    assert_tiles_are_equal(interpreter.call, "cpu", torch.float32, phases, trains_rows, 2e-6)


def test_plain_torch_does_not_wait_for_the_device():
    with FakeTensorMode():  # it raises where a value is asked for
        scores, scale, ones = torch.ones(3, 4), torch.ones(()), torch.ones(3)
        for out in (scores, scores.half()):
            plain_soft_max_gradient(scores, scale, plain_row_largest(scores, scale), ones, out)


def test_plain_torch_takes_float64():
    scores, scale = torch.rand(3, 4, dtype=torch.float64), torch.tensor(2.0)
    largest = plain_row_largest(scores, scale)
    found = plain_soft_max_gradient(scores, scale, largest, torch.ones(3).double(), torch.empty_like(scores))
    torch.testing.assert_close(largest.log_sum_exp(), (scores * 2).logsumexp(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(found, (scores * 2).softmax(1), rtol=1e-14, atol=0)


def test_the_kernels_take_float32_where_triton_runs(interpreter):
    assert interpreter.call(fused.can_fuse, torch.ones(2, 3))
    assert not interpreter.call(fused.can_fuse, torch.ones(2, 3, dtype=torch.float64))
    assert not fused.can_fuse(torch.ones(2, 3))


def test_without_triton_plain_torch_is_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "gradcache.kernels", raising=False)
    fused._launches.cache_clear()
    assert not fused.can_fuse(torch.ones(2, 3)) and not fused.can_fuse(torch.ones(2, 3))
    fused._launches.cache_clear()
    assert len(caplog.messages) == 1 and "plain torch" in caplog.text


def test_the_kernels_compile_for_gpus(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gradcache.kernels import row_largest_kernel, soft_max_gradient_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BLOCK": fused.BLOCK, "HALF_FLOOR": FLOOR / 2}
    for kernel, architecture in ((row_largest_kernel, 90), (soft_max_gradient_kernel, 90), (soft_max_gradient_kernel, 80)):
        kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | {"out_ptr": "*bf16"}
        signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
        given = {name: value for name, value in constants.items() if name in signature}
        source = ASTSource(kernel, signature, given)
        options = {"num_warps": fused.NUM_WARPS}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        assert ("bf16" in compiled.asm["ptx"]) == ("out_ptr" in signature)
