"""One rank among many against real ranks that hold what the others are said to hold, its memory against the plan, the command."""

import json
import math
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from gradcache import Batch, InfoNCE, LossOptions, NoSync, Temperature, Tower, cached_step
from gradcache.loss_memory import LossSizes, loss_bytes
from launch.bench.emulate import bench_emulate, drawn_negatives
from launch.bench.mirrored import KEY_STEP, Mirrors, fake_world, signs_of_ranks
from launch.bench_job_commands import bench_app
from launch.emulate_tables import emulate_parts
from launch.tables import as_markdown
from tests.allocator import Memory
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError

CPU, TEMPERATURE, WIDTH = torch.device("cpu"), 0.05, 384
PLAIN = LossOptions(objective=InfoNCE())
EVERY = [
    replace(PLAIN, gather="queries"),
    replace(PLAIN, gather="passages"),
    replace(PLAIN, gather="queries", symmetric=True, same_side=True, widths=(24, 8)),
    replace(PLAIN, gather="passages", symmetric=True, same_side=True),
]


def rows_of(rank: int, num_ranks: int, queries: int, hard: int, width: int, copies: int) -> tuple[Batch, torch.Tensor]:
    """Return a rank's batch and the rows that it encodes: rank 0's, mirrored. copies: passages that have the text of the last."""
    count = queries * (2 + hard)
    rows = torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(3)), dim=1)
    rows = (rows * signs_of_ranks(num_ranks, width)[rank]).requires_grad_()
    keys = torch.arange(count)
    keys[count - copies :] = count
    keys = keys + rank * KEY_STEP
    tower = Tower(encode=lambda x: x, lengths=torch.ones(count, dtype=torch.int64), load=lambda chosen: rows[chosen])
    target = torch.arange(queries)
    return Batch(
        towers=[tower], num_queries=queries, keys=keys, target=target, positive_keys=keys[queries:][target][:, None]
    ), rows


def step(batch: Batch, options: LossOptions, group):
    """Take a step that is not reduced over the ranks."""
    return cached_step(
        batch, loss=options, temperature=Temperature(TEMPERATURE, learnable=True), sync=NoSync(), group=group,
        chunk_tokens=10**6, keep_graphs=0, seed=0, step=0,
    )  # fmt: skip


def found_by(rank: int, num_ranks: int, group) -> list[tuple]:
    """Return of each way the loss, the masked share, and the gradient of this rank's rows."""
    found = []
    for options in EVERY:
        batch, rows = rows_of(rank, num_ranks, queries=6, hard=2, width=24, copies=3)
        result = step(batch, options, group)
        found.append((result.loss, result.share_masked, rows.grad))
    return found


def found_by_rank(rank: int) -> list[tuple]:
    return found_by(rank, dist.get_world_size(), dist.group.WORLD)


def emulated(rank: int, num_ranks: int) -> list[tuple]:
    with fake_world(num_ranks, CPU, rank) as world, Mirrors(rank, num_ranks).in_place():
        return found_by(rank, num_ranks, world.group)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_loss_masks_and_gradients_of_the_one_rank_are_those_of_real_ranks(num_ranks):
    real = run_ranks(found_by_rank, num_ranks)
    for rank in (0, num_ranks - 1):
        for here, there in zip(emulated(rank, num_ranks), real[rank], strict=True):
            assert here[0] == pytest.approx(there[0], rel=1e-5) and here[1] == pytest.approx(there[1], abs=1e-12) and here[1] > 0
            torch.testing.assert_close(here[2], there[2], rtol=1e-4, atol=1e-7)


def test_three_ranks_which_are_no_power_of_two_have_the_same_masks_and_nearly_the_same_loss():
    for here, there in zip(emulated(0, 3), run_ranks(found_by_rank, 3)[0], strict=True):
        assert here[1] == pytest.approx(there[1], abs=1e-12) and here[0] == pytest.approx(there[0], rel=0.1)


def test_every_rank_is_mirrored_by_signs_of_its_own_and_mirrors_of_mirrors_are_mirrors():
    signs = signs_of_ranks(64, WIDTH).float()
    agreement = signs @ signs.T / WIDTH
    assert (agreement - torch.eye(64)).abs().max() < 0.3, "pairs of ranks are no more alike than random ones"
    assert torch.equal(signs[5] * signs[12], signs[5 ^ 12]) and bool((signs[0] == 1).all())


def test_without_mirrors_a_fake_group_masks_nearly_everything():
    with fake_world(64, CPU) as world:
        batch, _ = rows_of(0, 64, queries=4, hard=0, width=8, copies=0)
        assert 64 * step(batch, EVERY[1], world.group).share_masked > 0.9, "and the ranks' shares are not summed"


def peaks_of(rank: int, hard: int) -> list[int]:
    """Return the peak of each way among as many real ranks as there are."""
    return [peak_of(rank, dist.get_world_size(), 256, hard, options, dist.group.WORLD) for options in EVERY[:2]]


def peak_of(rank: int, num_ranks: int, queries: int, hard: int, options: LossOptions, group) -> int:
    batch, rows = rows_of(rank, num_ranks, queries, hard, WIDTH, copies=0)
    rows.requires_grad_(False)
    with Memory() as memory:
        step(batch, options, group)
    return memory.peak


def emulated_peak(num_ranks: int, queries: int, hard: int, options: LossOptions) -> int:
    with fake_world(num_ranks, CPU) as world, Mirrors(0, num_ranks).in_place():
        return peak_of(0, num_ranks, queries, hard, options, world.group)


def test_one_of_two_emulated_ranks_holds_what_one_of_two_real_ranks_holds():
    for options, real in zip(EVERY[:2], run_ranks(peaks_of, 2, 3)[0], strict=True):
        assert emulated_peak(2, 256, 3, options) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("num_ranks", "queries"), [(64, 256), (512, 64)])
@pytest.mark.parametrize("options", EVERY[:2], ids=["queries", "passages"])
@pytest.mark.parametrize("hard", [0, 3])
def test_the_loss_of_one_of_many_ranks_holds_what_is_foreseen(num_ranks, queries, options, hard):
    sizes = LossSizes(
        queries=num_ranks * queries, passages=num_ranks * queries * (1 + hard), width=WIDTH, num_ranks=num_ranks, is_even=True
    )
    said = loss_bytes(options, sizes, CPU, 10**10).total
    assert emulated_peak(num_ranks, queries, hard, options) == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize("options", EVERY[:2], ids=["queries", "passages"])
def test_the_loss_of_random_rows_is_that_of_so_many_random_columns(options):
    with fake_world(64, CPU) as world, Mirrors(0, 64).in_place():
        batch, _ = rows_of(0, 64, queries=64, hard=1, width=WIDTH, copies=0)
        result = step(batch, options, world.group)
    # Scores over the temperature are normal with this variance; the mean of their exponential is exp(variance / 2).
    variance = 1 / (TEMPERATURE**2 * WIDTH)
    assert result.loss == pytest.approx(math.log(64 * 64 * 2) + variance / 2, abs=4 * math.sqrt(variance / 64))
    assert result.num_queries == 64 * 64 and result.share_masked == 0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("emulate")
    data, model = write_tiny_dataset(root / "data"), write_tiny_encoder(root / "encoder")
    (root / "job.toml").write_text(
        f'[run]\nfolder = "{root}/run"\n[data]\npath = "{data}"\ncache = "{root}/cache"\n[model]\nname = "{model}"\n'
        "[batch]\nqueries = 64\n[negatives]\nper_query = 2\n"
    )
    return root / "job.toml"


def test_a_job_is_measured_by_phase_beside_its_plan(job):
    found = bench_emulate(job, ["parallel.backend=ddp"], [4, 16], 4, 1)
    few, many = found["sizes"]
    assert (few["queries"], many["queries"]) == (16, 64) and few["passages_per_rank"] == many["passages_per_rank"] == 12
    assert few["share_masked"] == pytest.approx(many["share_masked"], abs=0.1) and math.isfinite(many["loss"])
    for size in found["sizes"]:
        assert set(size["seconds"]) >= {"encode", "control", "gather", "masks", "loss", "encode_again", "optimizer"}
        assert "others" not in size["seconds"] and size["own_s"] == pytest.approx(sum(size["seconds"].values()), abs=1e-4)
        assert size["plan_gib"]["gradients"] >= 0 and set(size["memory"]) == {"step", "loss", "encode_again"}
    text = as_markdown(emulate_parts(found))
    assert "16 ranks x 4, the loss" in text and "no figure has communication" in text
    assert not (job.parent / "run").exists(), "nothing is trained or written"
    assert not dist.is_initialized()


def test_the_batch_of_a_job_is_cut_by_the_ranks_and_sharded_weights_are_measured_too(job):
    result = CliRunner().invoke(
        bench_app, ["emulate", str(job), "--ranks", "4,32", "--rounds", "1", "--json", "parallel.backend=fsdp2"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [size["queries_per_rank"] for size in found["sizes"]] == [16, 2] and found["mode"] == "strong"
    assert found["backend"] == "fsdp2"


@pytest.mark.parametrize(
    ("ranks", "queries", "overrides", "sentence"),
    [
        ([1], None, [], "--ranks 1 leaves nothing to emulate; expected 2 or more"),
        ([128], None, [], "batch.queries=64 is fewer than 128 ranks; set it to a multiple, or --queries-per-rank"),
        ([10], None, [], "batch.queries=64 is not divisible by 10 ranks"),
        ([2], 1000, [], "training quer.* and a rank would have 1000; set --queries-per-rank"),
        ([2], None, ["parallel.backend=zero1"], 'parallel.backend="zero1" cannot be emulated'),
        ([2**22], 32, [], "one of 4,194,304 ranks with 32 queries each would hold .* embeddings and their gradients, and"),
    ],
)
def test_what_cannot_be_measured_here_is_refused_in_one_sentence(job, ranks, queries, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        bench_emulate(job, overrides, ranks, queries, 1)


def test_a_list_of_ranks_that_is_none_is_refused(job):
    result = CliRunner().invoke(bench_app, ["emulate", str(job), "--ranks", "64;512"])
    assert isinstance(result.exception, InputError)
    assert re.search("--ranks 64;512 is no list of numbers; expected one as 64,512,4096", str(result.exception))


def test_hard_negatives_are_drawn_once_each_while_the_corpus_lasts():
    dataset = types.SimpleNamespace(
        num_queries=5, positive_indptr=np.arange(6), positive_rows=np.arange(5), passage_keys=np.arange(12)
    )
    found = drawn_negatives(dataset, np.array([1, 4]), 3)
    assert len(set(found.ids)) == 6 and not {1, 4} & set(found.ids)
    assert np.diff(found.indptr).tolist() == [0, 3, 0, 0, 3]
    assert drawn_negatives(dataset, np.array([1]), 0) is None
