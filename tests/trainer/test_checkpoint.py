"""A checkpoint of any backend opens under every other one, and training goes on as if nothing had happened."""

import errno
import os
import re
import shutil

import pytest
import torch
import torch.distributed as dist

import trainer.checkpoint
import trainer.parts
from gradcache import Temperature, cached_step
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.ranks import run_ranks
from trainer.backends import parallelize
from trainer.checkpoint import Saver, load_state, load_weights
from trainer.early_stop import EarlyStop, RollBack, StopSettings
from trainer.ema import build_average
from trainer.errors import InputError, MustNotGoOn
from trainer.handoff import manifest, retry
from trainer.handoff.claim import Claim
from trainer.handoff.manifest import read_latest, versions
from trainer.handoff.weights import open_checkpoint
from trainer.job import EmaSettings, OptimSettings, ParallelSettings, PrecisionSettings, TrainJob
from trainer.parallel import copy_weights
from trainer.parts import Parts, write_part
from trainer.state import TrainState
from trainer.world import COLLECTIVE_TIMEOUT_S, World

OPTIM = OptimSettings(lr=1e-2, max_grad_norm=0.5)
ROWS = {1: (8,), 2: (5, 3), 3: (4, 3, 1), 4: (4, 0, 3, 1)}
HYBRID = "fsdp2 on two nodes"
SETTINGS_OF = {HYBRID: ParallelSettings(backend="fsdp2", shard_group="node")}
PART_BYTES = 64 * 2**10  # so small that several ranks write
SHARDED = ["fsdp2", "zero1", "zero2", "zero3"]


def world_of(rank, num_ranks):
    trainer.parts.PART_BYTES = PART_BYTES  # type: ignore[attr-defined]
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    group = dist.group.WORLD if num_ranks > 1 else None
    return World(rank, num_ranks, torch.device("cpu"), group, group, ranks_per_node=2)


def prepared(world, backend, dropout, folder=None):
    """Return a state under a backend, from a checkpoint if there is one, and a plain copy of its encoder."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    encoder, plain = (TinyEncoder(0, dropout).train() for _ in range(2))
    temperature = Temperature(0.1, learnable=True)
    if folder is not None:
        load_weights(open_checkpoint(folder), encoder, world)
    parallel = parallelize(encoder, world, SETTINGS_OF.get(backend) or ParallelSettings(backend=backend), OPTIM)
    of_temperature = torch.optim.AdamW(temperature.parameters(), lr=1e-2, weight_decay=0.0)
    average = build_average(parallel, EmaSettings(decay=None if backend == "zero3" else 0.5))
    decisions = EarlyStop(StopSettings()), RollBack(StopSettings())
    state = TrainState(parallel, temperature, of_temperature, torch.amp.GradScaler(enabled=False), average, *decisions)
    if folder is not None:
        load_state(open_checkpoint(folder), state, world)
    return state, plain


def take_steps(world, state, num_steps):
    rows = ROWS[world.num_ranks]
    for _ in range(num_steps):
        cached_step(
            make_batch(world.rank, rows[world.rank], [state.parallel.module], seed=state.step),
            temperature=state.temperature,
            sync=state.parallel.sync,
            group=world.group,
            keep_graphs=1,
            loss=LOSS,
            **SETTINGS | {"step": state.step},
        )
        state.parallel.update(state.scaler)
        state.average.update()
        state.loss_optimizer.step()
        state.loss_optimizer.zero_grad()
        state.step += 1


def weights(state, plain):
    """Return the weights, their averages, and the temperature."""
    copy_weights(state.parallel, plain)
    found = {name: p.detach().clone() for name, p in plain.named_parameters()}
    with state.average.swapped_in():
        copy_weights(state.parallel, plain)
    found |= {f"average of {name}": p.detach().clone() for name, p in plain.named_parameters()}
    return found, state.temperature.value


def save_then_go_on(rank, num_ranks, backend, dropout, run):
    """Take two steps, save, take two more; return the weights after all."""
    world = world_of(rank, num_ranks)
    state, plain = prepared(world, backend, dropout)
    take_steps(world, state, 2)
    copy_weights(state.parallel, plain)
    saver = Saver(run, world, Claim(run, "trainer", 1))

    def write_encoder(folder):
        (folder / "weights").write_text("here")
        return {"weights_digest": "0123"}

    saver.save(state, write_encoder if world.speaks else None)
    take_steps(world, state, 2)  # while the thread writes
    saver.wait()
    dist.barrier() if num_ranks > 1 else None
    if world.speaks:
        checkpoint = open_checkpoint(run / "checkpoints" / "step-00000002")
        assert checkpoint.manifest["weights_digest"] == "0123"
        assert [p.name for p in versions(run / "checkpoints")] == ["step-00000002"]
        assert not list((run / "checkpoints").glob(".parts*"))
    return weights(state, plain)


@pytest.mark.parametrize("seconds", [1e-9, 1e9])
def test_a_save_that_a_time_limit_might_not_await_is_said(seconds, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NEGPOOL_SAVE_SECONDS", str(seconds))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # and forgotten afterwards
    save_then_go_on(0, 1, "ddp", 0.0, tmp_path)
    said = [message for message in caplog.messages if "a save takes" in message]
    assert len(said) == (seconds < 1), said
    assert not said or "s, more than half of the 1e-09 s before the time limit that it has there; submit with --save-s" in said[0]


def fail_on_one_rank(rank, num_ranks, error, run):
    """Save where the last rank's part cannot be written; return what each rank's wait raises."""
    world = world_of(rank, num_ranks)
    state, _ = prepared(world, "ddp", 0.0)
    saver = Saver(run, world, Claim(run, "trainer", 1))
    retry.DELAYS_S = (0.01, 0.01)  # type: ignore[assignment]

    def write_part_or_fail(path, fragments):
        if rank == num_ranks - 1:
            raise error
        write_part(path, fragments)

    trainer.checkpoint.write_part = write_part_or_fail  # type: ignore[attr-defined]
    saver.save(state, (lambda folder: {}) if world.speaks else None)
    try:
        saver.wait()
    except BaseException as raised:
        return type(raised).__name__, str(raised), getattr(raised, "step", None), saver.has_failed()
    return "nothing"


# safetensors has an error of its own, which is no OSError.
FULL = RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "code", "name", "sentence", "step"),
    [
        (FULL, "1", "MachineFailed", "no room left on the disk for", 0),
        (OSError(errno.ESTALE, "Stale file handle"), "1", "MachineFailed", "step-00000000 failed: Stale file handle", 0),
        (ValueError("a bug"), "1", "ValueError", "a bug", None),
        (MustNotGoOn("a part is not finite"), "78", "MustNotGoOn", "a part is not finite", None),
    ],
)
def test_a_part_that_cannot_be_written_ends_all_ranks_and_one_says_it(tmp_path, error, code, name, sentence, step):
    *others, last = run_ranks(fail_on_one_rank, 3, 3, error, tmp_path, timeout_s=COLLECTIVE_TIMEOUT_S / 10)
    assert others == [("SystemExit", code, None, False)] * 2, "nobody waits for a part that never comes"
    assert last[0] == name and sentence in last[1] and last[2:] == (step, True)
    assert not versions(tmp_path / "checkpoints")


def stale_for_a_while(function, times):
    """Return a function that raises so many times before it does its work."""
    left = [times]

    def call(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return function(*args)

    return call


@pytest.mark.parametrize("place", ["parts", "links", "manifest", "latest", "prune"])
def test_a_checkpoint_is_written_when_the_disk_is_well_again(tmp_path, monkeypatch, place):
    monkeypatch.setattr(trainer.parts, "PART_BYTES", PART_BYTES)  # what `world_of` sets: for this test alone
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    world = world_of(0, 1)
    state, plain = prepared(world, "ddp", 0.0)
    saver, prune = Saver(tmp_path, world, Claim(tmp_path, "trainer", 1)), lambda: None
    monkeypatch.setattr(retry, "DELAYS_S", (0.01, 0.01))
    if place == "parts":
        monkeypatch.setattr(trainer.checkpoint, "write_part", stale_for_a_while(write_part, 2))
    elif place == "links":  # every way to take the part over
        monkeypatch.setattr(os, "link", stale_for_a_while(os.link, 2))
        monkeypatch.setattr(trainer.checkpoint.shutil, "copy2", stale_for_a_while(shutil.copy2, 1))
    elif place == "manifest":  # the parts are there for the second try
        monkeypatch.setattr(manifest, "_fsync", stale_for_a_while(manifest._fsync, 2))
    elif place == "latest":
        monkeypatch.setattr(trainer.checkpoint, "write_latest", stale_for_a_while(trainer.checkpoint.write_latest, 2))
    else:  # once, and nobody waits: the next checkpoint prunes again
        prune = stale_for_a_while(prune, 1)
    saver.save(state, lambda folder: {"weights_digest": "0123"}, prune)
    saver.wait()
    found = open_checkpoint(tmp_path / "checkpoints" / "step-00000000")
    assert found.manifest["weights_digest"] == "0123" and read_latest(tmp_path / "checkpoints") == "step-00000000"
    load_weights(found, plain, world)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def save_what_is_broken(rank, num_ranks, kind, run):
    """Save a good state, then one with a broken element in a tensor of a kind; return what this rank's wait raises."""
    world = world_of(rank, num_ranks)
    state, _ = prepared(world, "ddp", 0.0)
    saver = Saver(run, world, Claim(run, "trainer", 1))
    saver.save(state, (lambda folder: {}) if world.speaks else None)
    saver.wait()
    *_, last = (fragment for fragment in state.fragments() if fragment.name.startswith(kind))
    last.values[-1] = float("inf")
    state.step = 1
    saver.save(state, (lambda folder: {}) if world.speaks else None)
    try:
        saver.wait()
    except (MustNotGoOn, SystemExit) as raised:
        return str(raised)
    return "nothing"


@pytest.mark.parametrize("kind", ["parameter", "exp_avg_sq", "average"])
def test_what_is_not_finite_is_never_published_and_ends_all_ranks(tmp_path, kind):
    code, sentence = sorted(run_ranks(save_what_is_broken, 2, 2, kind, tmp_path, timeout_s=COLLECTIVE_TIMEOUT_S / 5))
    assert re.match(
        rf"step 1: {kind}\..* is not finite and was not saved; the last good checkpoint is .*step-00000000; set", sentence
    )
    assert code == "78", "no rank publishes, whichever holds it"
    assert [folder.name for folder in versions(tmp_path / "checkpoints")] == ["step-00000000"]


def resume(rank, num_ranks, backend, dropout, run):
    world = world_of(rank, num_ranks)
    state, plain = prepared(world, backend, dropout, run / "checkpoints" / "step-00000002")
    assert state.step == 2 and state.parallel.num_updates == 2
    take_steps(world, state, 2)
    return weights(state, plain)


def count_opens(rank, num_ranks, backend, run):
    """Resume; return the names of the parts that this rank opened, one entry a time."""
    opened, original = [], trainer.parts.safe_open
    trainer.parts.safe_open = lambda path, **how: opened.append(path.name) or original(path, **how)  # type: ignore[attr-defined]
    prepared(world_of(rank, num_ranks), backend, 0.0, run / "checkpoints" / "step-00000002")
    return opened


def test_rank_0_reads_for_all_under_ddp(tmp_path):
    run_ranks(save_then_go_on, 3, 3, "ddp", 0.0, tmp_path)
    names = [path.name for path in sorted((tmp_path / "checkpoints" / "step-00000002" / "state").glob("part-*"))]
    assert len(names) == 3
    first, *others = run_ranks(count_opens, 3, 3, "ddp", tmp_path)
    assert sorted(first) == sorted(2 * names), "once for the weights, and once for the state"
    assert others == [[], []]


def assert_close(actual, expected, exactly=False):
    assert actual[1] == (expected[1] if exactly else pytest.approx(expected[1], rel=1e-5))
    for name, values in expected[0].items():
        if name.endswith("key.bias") and not exactly:
            continue  # attention does not depend on it: its gradient is rounding, which AdamW makes large
        tolerance = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(actual[0][name], values, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# The sum of two gradients is the same in any order; that of three shows where a backend sums in another one after a resume.
@pytest.mark.parametrize(("backend", "num_ranks"), [("ddp", 3), *((backend, 2) for backend in SHARDED)])
def test_a_resumed_run_goes_the_way_of_an_undisturbed_one_to_the_bit(tmp_path, backend, num_ranks):
    undisturbed = run_ranks(save_then_go_on, num_ranks, num_ranks, backend, 0.2, tmp_path)
    start = TinyEncoder(0, 0.2)
    found = undisturbed[0][0]
    assert any(not torch.equal(p, found[name]) for name, p in start.named_parameters()), "it trains"
    is_averaged = [not torch.equal(found[name], found[f"average of {name}"]) for name, _ in start.named_parameters()]
    assert any(is_averaged) == (backend != "zero3")
    for found in run_ranks(resume, num_ranks, num_ranks, backend, 0.2, tmp_path):
        assert_close(found, undisturbed[0], exactly=True)


@pytest.mark.parametrize("other", SHARDED)
def test_a_checkpoint_of_one_backend_opens_under_another(tmp_path, other):
    (wanted, *_) = run_ranks(save_then_go_on, 2, 2, "ddp", 0.0, tmp_path / "ddp")
    if other == "zero3":  # averages nothing
        wanted = {name: values for name, values in wanted[0].items() if not name.startswith("average")}, wanted[1]
    run_ranks(save_then_go_on, 2, 2, other, 0.0, tmp_path / other)
    for found in run_ranks(resume, 2, 2, other, 0.0, tmp_path / "ddp"):
        assert_close(found, wanted)
    for found in run_ranks(resume, 2, 2, "ddp", 0.0, tmp_path / other):
        assert_close(found, wanted)


def test_a_checkpoint_of_two_nodes_with_a_copy_each_holds_everything_once_and_opens_anywhere(tmp_path):
    wanted = run_ranks(save_then_go_on, 4, 4, "ddp", 0.0, tmp_path / "ddp")[0]
    for found in run_ranks(save_then_go_on, 4, 4, HYBRID, 0.0, tmp_path / "hybrid"):
        assert_close(found, wanted)
    parts, of_ddp = (Parts(tmp_path / name / "checkpoints" / "step-00000002" / "state") for name in ("hybrid", "ddp"))
    assert sorted(parts.names()) == sorted(of_ddp.names())
    for name, (numel, runs) in parts.index.items():
        assert sum(stop - start for start, stop, _ in runs) == numel == of_ddp.numel(name), "everything once"
        torch.testing.assert_close(parts.read(name, 0, numel), of_ddp.read(name, 0, numel), atol=1e-5, rtol=1e-4)
    assert len({file for _, runs in parts.index.values() for _, _, file in runs}) == 4, "copies share the writing"
    for found in run_ranks(resume, 4, 4, HYBRID, 0.0, tmp_path / "ddp"):
        assert_close(found, wanted)
    # Two ranks take other rows of the same batches, so only the state is compared.
    for found in run_ranks(state_of, 2, 2, "ddp", 0.0, tmp_path / "hybrid"):
        assert found.keys() == {name for name in parts.names() if not name.startswith("parameter")}
        for name, values in found.items():
            assert torch.equal(values, parts.read(name, 0, len(values))), name


def state_of(rank, num_ranks, backend, dropout, run):
    """Return moments and averages as a rank holds them after a resume."""
    state, _ = prepared(world_of(rank, num_ranks), backend, dropout, run / "checkpoints" / "step-00000002")
    return {f.name: f.values.clone() for f in state.fragments() if not f.name.startswith("parameter")}


def test_float16_is_refused_where_nothing_scales_it():
    with pytest.raises(InputError, match=r'set precision\.encode="bf16" or parallel\.backend="ddp"'):
        TrainJob(precision=PrecisionSettings(encode="fp16"), parallel=ParallelSettings(backend="zero2"))
