"""One size of the scaling benchmark on real ranks: its phases, who waits, what is sent; and the arithmetic behind them."""

import dataclasses
import importlib.util
import os
import time

import pytest

from gradcache.buckets import BUCKET
from gradcache.spans import TimedSpan
from launch.bench.scaling import worker
from launch.bench.scaling.cores import own_cores
from launch.bench.scaling.counters import most_sent
from launch.bench.scaling.times import bus_bandwidths, compared, phases_of, times_of_step
from launch.jobfile import read_job
from launch.ranks import on_ranks
from launch.step_phases import HIDDEN, PHASES
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.errors import InputError

SLOW_S = 0.4


def made(name, begin_s, end_s, collective=None, self_s=None):
    self_s = end_s - begin_s if self_s is None else self_s
    return TimedSpan(name=name, begin_s=begin_s, end_s=end_s, self_s=self_s, collective=collective, num_bytes=800)


def spans_of(gather_s: float, exposed_s: float) -> list[TimedSpan]:
    """A step of 1 s of encoding, a gather, 2 s of backward, 0.5 s of an update, and 0.25 s between them."""
    first = 1.25 + gather_s
    end = first + 2 + exposed_s
    return [
        made("step", 0, end + 0.5, self_s=0.25),
        made("encode", 0, 1),
        made("gather", 1.25, first, "all_gather"),
        made("backward", first, end),
        made("update", end, end + 0.5),
        made(BUCKET, first + 1, first + 1.5, "all_reduce"),
        made(BUCKET, first + 2, end, "all_reduce"),
    ]


def test_what_a_collective_takes_longer_than_on_the_last_rank_is_waiting():
    steps = [[times_of_step(spans_of(0.1, 0.7))], [times_of_step(spans_of(0.4, 0.2))]]
    first, second = compared(steps)
    assert first.phases["idle"] == pytest.approx([0.5]) and second.phases["idle"] == pytest.approx([0.3])
    for rank in (first, second):
        assert rank.phases["gather"] == pytest.approx([0.1]) and rank.phases["parameters"] == pytest.approx([0.2])
        assert rank.phases["encode_again"] == pytest.approx([2.0]) and rank.phases[HIDDEN] == pytest.approx([0.5])
        assert sum(rank.phases[phase][0] for phase in PHASES) == pytest.approx(rank.step_s[0])
    assert first.busy_s == pytest.approx(first.step_s[0] - 0.5)
    bus = {(row["collective"], row["num_bytes"]): row for row in bus_bandwidths(steps)}
    assert bus["all_gather", 800]["bytes_per_s"] == pytest.approx(800 / 2 / 0.1)
    assert phases_of([first, second], ("parameters", HIDDEN))["parameters"] is None


def test_cores_are_shared_out_or_what_fits_is_said():
    assert [own_cores([2, 3, 4, 5, 6], rank, 2, 2) for rank in range(2)] == [[2, 3], [4, 5]]
    assert own_cores([2, 3, 4, 5, 6], 0, 1, 2) == [2, 3]
    with pytest.raises(InputError, match="4 ranks of 2 threads need 8 cores of their own, and this machine gives 5; 2 ranks fit"):
        own_cores([2, 3, 4, 5, 6], 0, 4, 2)


def test_the_interface_that_sent_most_counts():
    assert most_sent({"lo": 5, "eth0": 100, "gone": 1}, {"lo": 95, "eth0": 110}) == ("lo", 90) and most_sent({}, {}) is None


def job_of(root, *overrides):
    keys = ["run.folder=runs/none", f"data.path={root}/data", f"data.cache={root}/cache", f"model.name={root}/encoder"]
    return read_job(None, [*keys, "chunk.tokens=64", "chunk.keep_graphs=1", "loss.gather=queries", *overrides])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scaling")
    write_tiny_dataset(root / "data")
    write_tiny_encoder(root / "encoder")
    return root


def measured(rank, root, slow_rank, *overrides, steps=5):
    """Return what the worker reports of a few steps, in which one rank sleeps before it encodes."""
    prepare = worker.prepare

    def prepare_slowly(job, world):
        run = prepare(job, world)
        if rank == slow_rank:
            of_step = run.batches.of_step

            def slow(*args):
                time.sleep(SLOW_S)
                return of_step(*args)

            run.batches.of_step = slow
        return run

    worker.prepare = prepare_slowly  # in a process of its own
    return worker.measure(world_of(rank), job_of(root, *overrides), "job", 8, 2, steps)


def test_phases_add_up_and_a_slow_rank_shows_as_the_others_waiting(root):
    found = run_ranks(measured, 2, root, 1)[0]
    assert found["ranks"] == 2 and found["queries_per_rank"] == 4 and len(found["step_s"]) == 5
    assert set(found["phases"]) == {*PHASES, HIDDEN}
    step_s = sorted(found["step_s"])[2]
    total_s = sum(phase["mean_s"] for name, phase in found["phases"].items() if name != HIDDEN)
    assert total_s == pytest.approx(step_s, rel=0.15)  # medians of phases are of different steps
    first, second = found["ranks_measured"]
    assert first["idle_s"] > second["idle_s"] + 0.5 * SLOW_S and second["busy_s"] > first["busy_s"] + 0.5 * SLOW_S
    assert found["slowest_rank"] == 1 and found["slowest_host"] == first["host"]
    assert found["phases"]["data"]["max_s"] >= SLOW_S
    for name in set(PHASES) - {"data", "idle", "rest"}:
        assert found["phases"][name]["mean_s"] > 0, name
    counted, formula = found["bytes"]["counted"], found["bytes"]["formula"]
    assert counted == pytest.approx(formula, rel=0.03)
    assert found["tokens"] > 0 and found["flops"] > 0 and found["matmul_flops_per_s"] > 0 and first["peak_gib"] > 0
    assert {row["collective"] for row in found["bus"]} == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all"}


@pytest.mark.parametrize(
    "negatives",
    [
        ["negatives.when_stale=wait", "negatives.max_age_steps=4", "checkpoint.every_steps=2"],
        ["negatives.schedule=[{checkpoint=2, step=3}, {checkpoint=4, step=9}]", "checkpoint.every_steps=2", "optim.steps=20"],
        ["batch.clusters=mined", "negatives.first_wait_s=0"],
    ],
    ids=["stale ones are waited for", "a fixed schedule", "mined clusters"],
)
def test_a_job_whose_miner_does_not_run_has_as_many_negatives(root, negatives):
    found = run_ranks(alone, 1, root, ["negatives.per_query=2", "sample.num_negatives=4", *negatives])[0]
    assert found["passages_per_query"] == 3.0 and found["negatives"] == "drawn at random"
    assert found["bytes"] == {"counted": 0.0, "formula": 0.0, "interface": found["bytes"]["interface"]} and found["bus"] == []
    assert found["phases"]["idle"]["max_s"] == 0.0


def alone(rank, root, overrides):
    worker.matmul_rate = lambda *_: 1e9  # in a process of its own; it takes seconds, and is not the question
    return worker.measure(world_of(rank), job_of(root, *overrides), "job", 8, 1, 3)


WIDE_OPEN = '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'  # zero3 keeps no weight whole


def sharded(rank, root, cases):
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")  # for DeepSpeed
    return [alone(rank, root, overrides) for overrides in cases]


def test_sharding_backends_send_what_the_formula_says_and_say_nothing_of_what_they_do_not_tell_apart(root):
    (root / "zero3.json").write_text(WIDE_OPEN)
    cases = [["parallel.backend=fsdp2"], ["parallel.backend=fsdp2", "parallel.reduce=chunk", "chunk.keep_graphs=0"]]
    cases += [["parallel.backend=fsdp2", "parallel.reshard_after_forward=false"]]
    if importlib.util.find_spec("deepspeed") is not None:
        cases += [["parallel.backend=zero1"], ["parallel.backend=zero2", "parallel.reduce=chunk"], ["parallel.backend=zero3"]]
        cases += [["parallel.backend=zero3", f"parallel.deepspeed={root}/zero3.json"]]
    for overrides, found in zip(cases, run_ranks(sharded, 2, root, cases, timeout_s=240)[0], strict=True):
        assert found["phases"]["parameters"] is None and found["phases"][HIDDEN] is None
        assert found["bytes"]["counted"] == pytest.approx(found["bytes"]["formula"], rel=0.03), overrides


def test_a_whole_start_on_pinned_cores_reports_and_a_batch_that_cannot_be_divided_is_refused(root):
    text = [f'[data]\npath="{root}/data"\ncache="{root}/cache"', f'[model]\nname="{root}/encoder"', "[negatives]\nper_query=1"]
    (root / "job.toml").write_text("\n".join(text))
    given = {"job": str(root / "job.toml"), "overrides": [], "data": "job", "warm_up": 1, "steps": 2, "threads": 1, "pin": True}
    found = on_ranks("launch.bench.scaling.worker", 1, queries=8, **given)
    assert found["threads"] == 1 and found["ranks"] == 1 and not (root / "runs").exists()
    jobs = job_of(root)
    with pytest.raises(InputError, match="9 queries cannot be divided among 2 ranks; set --queries to a multiple"):
        worker.measure(dataclasses.replace(world_of(), num_ranks=2), jobs, "job", 9, 1, 1)
    with pytest.raises(InputError, match='data="made" are no made texts; expected "job", or one of made-256'):
        worker.measured_job(jobs.train, root, "made", 8, 3)
