"""Spans: nothing where nobody looks, self times that add up, collectives by kind; DDP's buckets without a changed bit."""

import time
import tracemalloc

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, InfoNCE, LossOptions, Temperature, cached_step
from gradcache.buckets import BUCKET, note_buckets, split_reductions
from gradcache.spans import TimedSpan, recording, span
from tests.gradcache.made import made_batch
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_a_span_that_nobody_records_is_one_object_and_allocates_nothing():
    assert span("encode") is span("gather", "all_gather", torch.ones(3))
    values = torch.ones(3)

    def some() -> None:
        for _ in range(100):
            with span("gather", "all_gather", values):
                pass

    some()
    tracemalloc.start()
    some()
    before = tracemalloc.get_traced_memory()[0]
    some()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after <= before


def test_self_times_are_without_the_spans_inside_and_add_up():
    with recording(CPU) as recorder:
        with span("step"):
            with span("loss"):
                time.sleep(0.02)
                with span("gather", "all_gather", torch.ones(5)):
                    time.sleep(0.03)
            with span("update"):
                time.sleep(0.01)
        found = recorder.read()
        assert recorder.read() == []
    step, loss, gather, update = found
    assert [each.name for each in found] == ["step", "loss", "gather", "update"]
    assert sum(each.self_s for each in found) == pytest.approx(step.duration_s, rel=1e-9)
    assert loss.self_s == pytest.approx(loss.duration_s - gather.duration_s, rel=1e-9) and loss.self_s >= 0.02
    assert (gather.collective, gather.num_bytes, update.collective) == ("all_gather", 20, None)
    with span("behind"):
        pass
    assert recorder.read() == []


def test_a_span_ends_where_an_error_leaves_it():
    with recording(CPU) as recorder:
        with pytest.raises(ValueError, match="in it"), span("encode"):
            raise ValueError("in it")
        with span("loss"):
            pass
        assert [each.name for each in recorder.read()] == ["encode", "loss"]


def test_torchs_profiler_sees_spans():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, span("encode"):
        torch.ones(3) + 1
    assert "encode" in {event.name for event in profile.events()}


def bucket(begin_s: float, end_s: float) -> TimedSpan:
    return TimedSpan(name=BUCKET, begin_s=begin_s, end_s=end_s, self_s=0.0, collective="all_reduce", num_bytes=1)


def test_reductions_are_hidden_until_the_last_bucket_starts():
    assert split_reductions([], 9.0) == (0.0, 0.0)
    assert split_reductions([bucket(1, 4)], 5.0) == (4.0, 0.0)
    # 1 to 3 and 4 to 6 ran beside the backward, whose work ends at 6.
    assert split_reductions([bucket(1, 2), bucket(1.5, 3), bucket(4, 8), bucket(6, 9)], 10.0) == (4.0, 4.0)


def steps(rank: int, is_noted: bool):
    """Return the gradients of two steps under DDP with several buckets, and the spans of the second step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 16))
    module = DistributedDataParallel(model, broadcast_buffers=False, bucket_cap_mb=0.01)
    sync = DDPSync(module)
    sync.settle_buckets()
    gradients = []
    with recording(CPU) as recorder:
        if is_noted:
            note_buckets(module, recorder)
        for step in range(2):
            recorder.read()
            model.zero_grad(set_to_none=True)
            cached_step(
                made_batch(rank, module), loss=LossOptions(objective=InfoNCE(), gather="queries"), temperature=Temperature(0.1),
                sync=sync, group=dist.group.WORLD, chunk_tokens=4, keep_graphs=1, seed=0, step=step,
            )  # fmt: skip
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return gradients, recorder.read()


def test_noting_the_buckets_changes_no_bit_of_the_gradients_of_three_ranks():
    plain, noted = run_ranks(steps, 3, False), run_ranks(steps, 3, True)
    for (without, _), (with_hook, spans) in zip(plain, noted, strict=True):
        for one, other in zip(without, with_hook, strict=True):
            assert all(g.abs().sum() > 0 for g in one.values())
            assert all(torch.equal(g, other[name]) for name, g in one.items())
        buckets = [each for each in spans if each.name == BUCKET]
        assert len(buckets) > 1 and sum(each.num_bytes for each in buckets) == sum(4 * g.numel() for g in without[0].values())
        (backward,) = [each for each in spans if each.name == "backward"]
        assert all(backward.begin_s <= each.begin_s <= each.end_s <= backward.end_s for each in buckets)
        names = [each.name for each in spans if each.collective is not None and each.name != BUCKET]
        assert names == ["control", "control", "gather", "statistics", "statistics", "reduce_scatter", "control"]
        of_one_rank = {each.name for each in spans if each.collective is None}
        assert of_one_rank == {"encode", "agree", "gather", "masks", "statistics", "loss", "reduce_scatter", "backward"}
