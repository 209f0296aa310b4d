"""The profile of some steps: the share of time from intervals, a trace that holds what a person looks for, a run unchanged."""

import gzip
import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from torch.profiler import record_function

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.encoder.settings import ModelSettings
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.handoff.weights import open_checkpoint
from trainer.job import BatchSettings, ChunkSettings, OptimSettings, ProfileSettings, TrainJob
from trainer.profile import ON_CPU, ON_GPU, NoProfile, TorchProfile, busy_share, covered, open_profile, union
from trainer.train import train


def as_cells(intervals):
    return {cell for begin, end in intervals for cell in range(begin, end)}


def test_the_share_is_that_of_the_units_that_any_interval_covers():
    draw = random.Random(0)
    for _ in range(200):
        intervals, windows = (
            [(begin, begin + draw.randrange(8)) for begin in (draw.randrange(40) for _ in range(draw.randrange(9)))]
            for _ in range(2)
        )
        joined, wanted = union(intervals), as_cells(windows)
        assert as_cells(joined) == as_cells(intervals) and all(a[1] < b[0] for a, b in itertools.pairwise(joined))
        expected = len(as_cells(intervals) & wanted) / len(wanted) if wanted else 0.0
        assert covered(intervals, windows) == pytest.approx(expected)


def event(cat, begin, end, name="k"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin}


def test_only_work_of_the_device_within_steps_counts():
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", 100, 200, "step 10"),
        event("user_annotation", 300, 400, "step 11"),
        event("user_annotation", 200, 300, "step back"),
        event("gpu_user_annotation", 100, 400, "step 10"),  # the host's mark once more, on the GPU's line
        event("kernel", 90, 150),
        event("kernel", 140, 160),  # of another stream, at the same time
        event("gpu_memcpy", 390, 410),
        event("kernel", 210, 290),
        event("cpu_op", 100, 200, "aten::mm"),
    ]
    assert busy_share(events, ON_GPU) == pytest.approx((60 + 10) / 200)
    assert busy_share(events, ON_CPU) == pytest.approx(0.5)
    assert busy_share(events[:1], ON_GPU) == 0.0


def test_steps_are_first_and_last_or_one_sentence():
    assert ProfileSettings(steps="10:13").numbers == range(10, 13) and not len(ProfileSettings().numbers)
    for wrong in ("13:10", "10", "0:3", "a:b", "3:3", "-1:3", ""):
        with pytest.raises(InputError, match=f'profile.steps="{wrong}" names no steps; expected "10:13" for the steps 10, 11'):
            ProfileSettings(steps=wrong)


def test_a_profile_behind_the_last_step_is_said_at_once(tmp_path, caplog):
    assert isinstance(open_profile(range(9, 12), range(4, 9), world_of(), tmp_path, print), NoProfile)
    assert 'profile.steps="9:12" has none of the steps from 4 on; no trace' in caplog.text
    caplog.clear()
    assert isinstance(open_profile(range(0), range(4, 9), world_of(), tmp_path, print), NoProfile) and not caplog.text


def events_of(path):
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def marks_of(path):
    return [event["name"] for event in events_of(path) if event.get("cat") == "user_annotation"]


def step_of(profile, number):
    profile.before_step(number)
    with record_function("encode"):
        torch.ones(64, 64) @ torch.ones(64, 64)
    profile.after_step(number)


def test_a_run_that_stops_among_the_steps_leaves_the_trace_of_those_it_did(tmp_path):
    told = []
    profile = TorchProfile(range(2, 9), world_of(), tmp_path / "logs", lambda *values: told.append(values))
    for number in (1, 2, 3):
        step_of(profile, number)
    profile.before_step(4)  # and fails in it
    profile.close()
    profile.close()
    assert [name for name in marks_of(tmp_path / "logs" / "profile-rank0.json.gz") if name != "encode"] == [
        "step 2", "step 3", "step 4",
    ]  # fmt: skip
    ((step, values),) = told
    assert step == 3 and values["profile/num_steps"] == 2


def test_each_rank_has_its_own_file_and_the_first_one_tells(tmp_path):
    profile = TorchProfile(range(1, 2), replace(world_of(), rank=1), tmp_path, lambda *_: pytest.fail("rank 1 tells nothing"))
    step_of(profile, 1)
    assert "encode" in marks_of(tmp_path / "profile-rank1.json.gz")


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "profile-rank0.json.gz").mkdir()
    profile = TorchProfile(range(1, 2), world_of(), tmp_path, print)
    step_of(profile, 1)
    profile.close()
    assert "no profile: " in caplog.text


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    write_tiny_dataset(root / "data")
    write_tiny_encoder(root / "encoder")
    return TrainJob(
        run=RunSettings(folder=root / "plain", trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder")),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=64, keep_graphs=1),
        optim=OptimSettings(steps=5, lr=1e-3),
        negatives=NegativesSettings(per_query=0),
    )


def test_a_profile_changes_no_number_and_shows_the_phases_of_its_steps(job, caplog):
    caplog.set_level("INFO")
    profiled = replace(job, run=replace(job.run, folder=job.run.folder.with_name("seen")), profile=ProfileSettings(steps="2:4"))
    weights, lines = [], []
    for each in (job, profiled):
        train(each, world_of())
        folder = each.run.folder
        weights.append(open_checkpoint(folder / "checkpoints" / "step-00000005").manifest["weights_digest"])
        lines.append([json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()])
    assert weights[0] == weights[1]
    losses = [[(line["loss"], line["grad_norm"]) for line in found if "loss" in line] for found in lines]
    assert losses[0] == losses[1] and len(set(losses[0])) == 5
    path = profiled.run.folder / "logs" / "profile-rank0.json.gz"
    found = marks_of(path)
    for name in ("step 2", "step 3", "batch", "encode", "loss", "backward", "update", "record"):
        assert found.count(name) == (1 if name.startswith("step") else 2), name
    (told,) = [line for line in lines[1] if line.get("event") == "profile"]
    assert told["step"] == 3 and told["profile/num_steps"] == 2 and 0 < told["profile/operators_share"] <= 1
    assert f"open {path} with https://ui.perfetto.dev" in caplog.text
