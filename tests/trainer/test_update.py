"""Updates that are left out: nothing moves, on any rank, under any backend, and what follows is as if they had never been."""

import math
from types import SimpleNamespace

import pytest
import torch

from gradcache import Temperature, cached_step
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.pretended import Waits
from tests.ranks import run_ranks
from tests.trainer.test_checkpoint import world_of
from trainer.backends import parallelize
from trainer.early_stop import EarlyStop, RollBack, StopSettings
from trainer.ema import build_average
from trainer.errors import InputError, MustNotGoOn
from trainer.handoff.settings import RunSettings
from trainer.job import EmaSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.loss_settings import LossSettings
from trainer.state import TrainState
from trainer.update import check_skipped, update

CASES = [
    ParallelSettings(backend="ddp"),
    ParallelSettings(backend="fsdp2"),
    *(ParallelSettings(backend=f"zero{stage}") for stage in (0, 1, 3)),
    ParallelSettings(backend="zero2", reduce="chunk"),
    *(ParallelSettings(backend=f"zero{stage}", offload=True) for stage in (2, 3)),
]


class Poison(torch.autograd.Function):
    """Returns what it is given; of the gradient that comes back, the first element is NaN."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.nan
        return gradient


def run_of(world, settings, scaler=None, loss=None):
    """Return what `update` needs of a run that is ready for its first step."""
    if settings.backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    job = TrainJob(optim=OptimSettings(lr=1e-2, max_grad_norm=0.5), loss=loss or LossSettings(learn_temperature=True))
    encoder = TinyEncoder(0, 0.2).train()
    parallel = parallelize(encoder, world, settings, job.optim)
    temperature = Temperature(job.loss.temperature, True, job.loss.min_temperature)
    state = TrainState(
        parallel,
        temperature,
        torch.optim.AdamW(temperature.parameters(), lr=1e-2, weight_decay=0.0),
        scaler or torch.amp.GradScaler(enabled=False),
        build_average(parallel, EmaSettings(decay=None if settings.backend == "zero3" else 0.5)),
        EarlyStop(StopSettings()),
        RollBack(StopSettings()),
    )
    saver = SimpleNamespace(wait=lambda: None)
    return SimpleNamespace(job=job, world=world, state=state, saver=saver, lr_factor=lambda step: 1.0, is_at_bound=False)


def take_step(run, poisoned=""):
    """Take a step whose gradient has one broken element: in one row of one parameter, or the temperature's."""
    state, world = run.state, run.world
    table = state.parallel.encoder.bert.embeddings.position_embeddings
    is_here = poisoned == "encoder" and world.rank == world.num_ranks - 1
    hook = table.register_forward_hook(lambda module, args, output: Poison.apply(output) if is_here else None)
    cached_step(
        make_batch(world.rank, 3 + world.rank, [state.parallel.module], seed=state.step),
        temperature=state.temperature,
        sync=state.parallel.sync,
        group=world.group,
        scaler=state.scaler,
        keep_graphs=1,
        loss=LOSS,
        **SETTINGS | {"step": state.step},
    )
    hook.remove()
    if poisoned == "temperature":
        state.temperature.log_scale.grad.fill_(math.inf)
    norm = update(run)
    state.step += 1
    return norm


def held(state):
    """Return copies of all that this rank holds, and the numbers beside it."""
    found = {fragment.name: fragment.values.clone() for fragment in state.fragments()}
    temperature = {name: torch.as_tensor(value) for name, value in state.values()["temperature"].items()}
    return found | temperature | {"num_updates": torch.tensor(state.parallel.num_updates)}


def assert_equal(found, wanted, case):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values), f"{case}: {name}"


def leave_out_updates(rank, num_ranks):
    """Take steps of which two are poisoned, and those that are left without them."""
    world = world_of(rank, num_ranks)
    for settings in CASES:
        poisoned, spared = (run_of(world, settings) for _ in range(2))
        take_step(poisoned), take_step(spared)
        before = held(poisoned.state)
        assert not math.isfinite(take_step(poisoned, "encoder")), settings
        assert_equal(held(poisoned.state), before, settings)
        take_step(poisoned, "temperature")
        assert_equal(held(poisoned.state), before, settings)
        assert (poisoned.state.num_skipped, poisoned.state.skipped_in_row) == (2, 2)
        spared.state.step = poisoned.state.step
        for _ in range(2):
            norm = take_step(poisoned)
            assert norm == take_step(spared) and 0 < norm < math.inf, settings
        assert_equal(held(poisoned.state), held(spared.state), settings)
        assert not torch.equal(held(poisoned.state)["exp_avg"], before["exp_avg"]), "steps move something"
        assert (poisoned.state.num_skipped, poisoned.state.skipped_in_row) == (2, 0)


def test_one_broken_element_of_one_rank_leaves_the_update_out_on_all(tmp_path):
    run_ranks(leave_out_updates, 2, 2, timeout_s=300)


def break_a_copy(rank, num_ranks):
    """Break the last rank's own copy of a gradient that all have summed."""
    run = run_of(world_of(rank, num_ranks), ParallelSettings())
    before = held(run.state)
    for parameter in run.state.parallel.trained().values():
        parameter.grad = torch.full_like(parameter, math.nan if rank == num_ranks - 1 else 1.0)
    update(run)
    assert_equal(held(run.state), before, rank)
    return run.state.num_skipped


def test_a_broken_copy_of_one_rank_does_not_part_the_replicas():
    assert run_ranks(break_a_copy, 2, 2) == [1, 1]


def test_the_loss_scale_falls_before_a_row_of_updates_left_out_begins():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = run_of(world_of(0, 1), ParallelSettings(), scaler)
    before, rows = held(run.state), []
    for _ in range(4):
        take_step(run, "encoder")
        rows.append((scaler.get_scale(), run.state.num_skipped, run.state.skipped_in_row))
    assert rows == [(2.0, 1, 0), (1.0, 2, 0), (0.5, 3, 1), (0.25, 4, 2)]
    assert_equal(held(run.state), before, "float16")
    take_step(run)
    assert run.state.skipped_in_row == 0 and run.state.parallel.num_updates == 1


def test_many_in_a_row_end_the_run(tmp_path):
    run = run_of(world_of(0, 1), ParallelSettings())
    run.job = TrainJob(run=RunSettings(folder=tmp_path), optim=OptimSettings(max_skipped=3))
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    run.state.step, run.state.skipped_in_row = 5, 2
    check_skipped(run)
    run.state.step, run.state.skipped_in_row = 6, 3
    with pytest.raises(MustNotGoOn, match=r"3 updates in a row .* optim\.max_skipped is 3; .* is .*step-00000002; set a lower"):
        check_skipped(run)


def test_a_learnt_temperature_stays_at_its_bound(caplog):
    loss = LossSettings(temperature=0.0105, min_temperature=0.01, learn_temperature=True)
    run = run_of(world_of(0, 1), ParallelSettings(), loss=loss)
    scale = run.state.temperature.log_scale
    for _ in range(30):
        scale.grad = torch.full_like(scale, -1.0)
        update(run)
    assert run.state.temperature.value == pytest.approx(0.01, rel=1e-6) and run.is_at_bound
    assert caplog.text.count("fallen to loss.min_temperature=0.01") == 1
    for _ in range(60):
        scale.grad = torch.full_like(scale, 1.0)
        update(run)
    assert run.state.temperature.value > 0.0101 and not run.is_at_bound


def test_a_learnt_start_below_the_bound_is_refused():
    with pytest.raises(InputError, match=r"loss\.temperature=0\.005.*below loss\.min_temperature=0\.01"):
        LossSettings(temperature=0.005, learn_temperature=True)
    assert LossSettings(temperature=0.005).min_temperature == 0.01, "a fixed one may be as small as it likes"


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=4.0)], ids=["float32", "float16"])
def test_the_host_waits_once_for_what_it_has_to_know_of_an_update(scaler):
    run = run_of(world_of(0, 1), ParallelSettings(), scaler)
    take_step(run)  # makes the optimizers' states
    for poisoned in ("", "encoder"):
        for parameter in (*run.state.parallel.trained().values(), run.state.temperature.log_scale):
            parameter.grad = torch.full_like(parameter, math.nan if poisoned else 0.5)
        with Waits(every=True) as seen:
            norm = update(run)
        of_scale = {"state.count_update": 1} if scaler and poisoned else {}  # only where an update is left out
        assert seen.places == {"parallel._read": 1} | of_scale, seen.places
        assert math.isfinite(norm) != bool(poisoned)
        assert run.temperature == pytest.approx(run.job.loss.temperature, rel=0.1)
