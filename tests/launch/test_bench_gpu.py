"""Every line of `negpool bench gpu` at a thousandth of its size, on a CPU: on a GPU nothing of it runs for the first time."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from launch.bench import exact_search, gpu, gpu_encoder, gpu_job, gpu_loss, gpu_mining, peer, recall, shapes, step
from launch.bench.busy import busy_share, count_waits, share_in_trace
from launch.bench.lines import LeftOut, Line
from launch.bench.report import write_report
from launch.bench.sizes import Sizes
from launch.gpu_tables import gpu_parts, reaches
from tests.launch import bench_lines
from trainer.encoder import compiled
from trainer.errors import InputError

CPU = torch.device("cpu")
TINY = Sizes(
    rounds=1,
    compiles=False,
    max_tokens=32,
    mixes=("made-mixed",),
    num_pairs=24,
    chunk_tokens=256,
    encoded_tokens=900,
    step_pairs=12,
    copied_bytes=2**16,
    loss_rows=48,
    pool=(8, 96),
    width=16,
    search=exact_search.SearchSize(queries=16, passages=9000, width=16, top_k=20, dtype=torch.float16),
    refreshed=240,
    indexed=(60, 4500),
    job_queries=8,
    job_steps=3,
)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A cache of this module's own, shapes of nothing, and a rate that costs no product."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("minilm", "bert-base"):
            patch.setitem(shapes.SHAPES, name, (2, 32, 2, 64))
        for module in (gpu_encoder, exact_search, step):
            patch.setattr(module, "matmul_rate", lambda device, dtype=torch.float32: 1e10)
        patch.setattr(gpu_encoder, "PROFILED_STEPS", 1)
        patch.setitem(peer.SETTINGS, "cpu", [{"mini_batch_size": 4}])
        yield


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def units(rows):
    """Return what each row found by its words and unit; all must be numbers."""
    assert all(isinstance(row.found, int | float) for row in rows), rows
    return {f"{row.what}, {row.unit}": row for row in rows}


def test_the_ceilings():
    product, copy = gpu_encoder.ceilings(TINY)
    assert product.what == "large matrix product, bf16" and product.found == 0.0 and copy.found >= 0


def test_the_encoder_is_measured_plain_and_compiled_and_as_the_miner_runs_it(monkeypatch):
    monkeypatch.setattr(compiled, "HOW", {"backend": "eager", "dynamic": True})
    rows = gpu_encoder.encoder(replace(TINY, compiles=True))
    both, forward = "bert-base, forward + backward, made-mixed", "bert-base, forward only, made-mixed"
    shares = {(row.what, row.word): row for row in rows if row.unit == "of the rate"}
    assert shares.keys() == {(both, "not compiled"), (forward, "not compiled"), (both, "compiled")}
    assert all(row.found > 0 and row.wanted == (0.60 if "only" in row.what else 0.55) for row in shares.values())
    tokens = [row for row in rows if row.unit == "M tokens/s"]
    assert all(row.found > 0 for row in tokens) and {row.what: row.wanted for row in tokens} == {both: None, forward: 2.2}


def test_a_cached_step_stands_against_the_peer_at_its_best():
    pytest.importorskip("sentence_transformers")
    rows = units(gpu_encoder.step(TINY))
    against = rows["bert-base, step, times as fast as sentence-transformers"]
    assert (against.wanted, against.word) == (3.0, "mini_batch_size=4")
    assert rows["bert-base, cached step of 12 pairs, of the rate"].wanted == 0.5
    busy = rows["bert-base, step, of the time the GPU is busy"]
    assert 0 < busy.found <= 1 and busy.wanted == 0.95
    assert rows["bert-base, step of twice the chunks, waits more"].found == 0, "a CPU waits for nothing"


@pytest.mark.parametrize(("error", "word"), [(InputError("no peer"), "not installed"), (None, "out of memory")])
def test_a_step_without_the_peer_says_why(monkeypatch, error, word):
    class NoFit:
        def trials(self, pairs, before):
            return {"mini_batch_size=4": None}

    def add(self):
        if error is not None:
            raise error
        return NoFit()

    monkeypatch.setattr(step.StepBench, "add_peer", add)
    monkeypatch.setattr(gpu_encoder, "_host", lambda *_: [])
    ours, _, against = gpu_encoder.step(TINY)
    assert ours.found > 0 and against.found is None and word in against.word


def test_the_small_model():
    rows = units(gpu_encoder.small_step(TINY))
    assert (
        rows["minilm, step, of the time the GPU is busy"].wanted == 0.8
        and rows["minilm, cached step of 12 pairs, M tokens/s"].found > 0
    )


def test_the_loss():
    for rows in (gpu_loss.loss(TINY), gpu_loss.pool(TINY)):
        assert rows[1].wanted == 1.3 and all(row.found >= 0 and row.less_is_better for row in rows)
    assert gpu_loss.loss(TINY)[0].wanted == 40.0 and "8 x 96" in gpu_loss.pool(TINY)[0].what


def test_exact_search_of_half_embeddings_on_the_device():
    took, share = gpu_mining.search(TINY)
    assert took.what == "search, 16 x 9,000, D 16, k 20" and took.found > 0
    assert share.wanted == 0.6 and share.word == "of a product in fp16"


def test_a_refresh_stands_against_bare_encoding():
    took, share, rate = gpu_mining.refresh(TINY)
    assert took.what == "bert-base, refresh, 240 x 12" and took.found > 0 and rate.found > 0
    assert share.found > 1 and share.wanted == 1.15 and share.less_is_better and "1,000,000 x 50,000" in share.word


def test_an_index_is_measured_where_a_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(gpu_mining, "num_gpus_of", lambda faiss: 1)
    monkeypatch.setattr(recall, "TOP_K", 20)
    took, share = gpu_mining.index(TINY)
    assert took.what.startswith("IVF64,Flat, 60 x 4,500, k 20, recall 0.9") or took.what.endswith("recall 1.000")
    assert took.found > 0 and share.found > 0 and share.wanted is None


def test_faiss_without_a_gpu_is_not_measured(monkeypatch):
    with pytest.raises(LeftOut, match=r"^not measured: this FAISS sees no GPU$"):
        gpu_mining.index(TINY)

    def refuse(factory):
        raise InputError("no FAISS")

    monkeypatch.setattr(gpu_mining, "load_faiss", refuse)
    with pytest.raises(LeftOut, match=r"^not measured: FAISS is not installed$"):
        gpu_mining.index(TINY)


def test_a_small_job_is_a_real_training():
    start, rate = gpu_job.job(TINY)[:2]
    assert 0 < start.found < gpu_job.time.time() and start.wanted == 15 and start.less_is_better
    assert rate.found > 0 and rate.word == ""


def test_a_job_that_takes_no_step_leaves_its_last_words(tmp_path):
    (tmp_path / "job.toml").write_text("[batch]\nqueries = 0\n")
    with pytest.raises(LeftOut, match=r"no step in 90 s; its last words: .*batch.queries"):
        gpu_job._run(tmp_path, TINY)


def test_half_a_record_is_left_for_the_next_look(tmp_path):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    assert gpu_job._records(tmp_path) == []
    (logs / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "event": "saved"}\n{"step": 2, "lo')
    assert [record["step"] for record in gpu_job._records(tmp_path)] == [1, 1]
    assert not gpu_job._is_through(tmp_path, TINY)


def test_how_busy_a_job_was_is_what_its_profile_says(monkeypatch):
    records = [{"step": i, "time": 1e9 + i, "loss": 1.0, "tokens_per_rank_per_s": 1e6 * i} for i in (1, 2, 3)]
    records.append({"step": 2, "event": "profile", "profile/gpu_busy_share": 0.83})
    monkeypatch.setattr(gpu_job, "_run", lambda folder, sizes: records)
    _, rate, busy = gpu_job.job(TINY)
    assert (rate.found, busy.found, busy.unit) == (2.5, 0.83, "of the time the GPU is busy")


def test_the_share_of_the_time_in_which_a_device_works(tmp_path):
    spans = [(0, 10), (2, 3), (8, 4), (20, 20)]  # start and length: 0 to 12 without a gap, then 20 to 40
    events = [{"cat": "kernel", "ts": start, "dur": length} for start, length in spans]
    events += [{"cat": "cpu_op", "ts": -50, "dur": 300}, {"cat": "kernel", "ts": 5}]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert share_in_trace(tmp_path / "trace.json", "cuda") == (12 + 20) / 40
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": []}))
    assert share_in_trace(tmp_path / "trace.json", "cuda") is None
    assert 0 < busy_share(lambda: torch.ones(200, 200) @ torch.ones(200, 200), 2, CPU) <= 1


def test_waits_are_operations_that_synchronise_and_calls(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: waited.append("event"))

    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (function warn_or_error)", stacklevel=1)
            torch.cuda.synchronize()
        torch.cuda.Event.synchronize("an event")
        warnings.warn("something else", stacklevel=1)

    assert count_waits(work, CPU) == 5
    assert waited == ["device", "device", "event"], "they wait as they would have"


def test_a_machine_without_a_gpu_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^negpool bench gpu needs an NVIDIA GPU, and torch sees none here"):
        gpu.bench_gpu(3, None)


def test_all_lines_fit_into_the_time_and_the_first_ones_are_those_of_the_promise():
    assert sum(line.needs_s for line in gpu.LINES) < gpu.BUDGET_S < 8 * 60
    assert [line.measure.__name__ for line in gpu.LINES][:3] == ["ceilings", "encoder", "loss"]
    assert len({line.measure for line in gpu.LINES}) == len(gpu.LINES) == 10


def test_a_report_is_there_behind_every_line_and_has_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = gpu.measure([Line("good", bench_lines.sized, 60), Line("absent", bench_lines.absent, 60)], TINY, 60, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert kept == found["rows"] and [row["found"] for row in kept] == [1.5, 0.2, None]
    assert [reaches(row) for row in kept] == [True, True, False]
    write_report(tmp_path, "gpu", found, gpu_parts(found))
    assert "| first | 1.5 | >= 1 | ms |" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.png").stat().st_size > 5000
