"""Trainer and miner together against each alone: divisions and figures from made logs, refusals, and one real small benchmark."""

import json

import pytest

from launch import local
from launch.bench.overlap import measure
from launch.bench.overlap.cases import planned
from launch.bench.overlap.course import describe_ages, describe_steps, refresh_seconds, step_times, time_to_reach
from launch.bench.overlap.division import Hardware, read_shares
from launch.bench.overlap.measure import bench_overlap, evaluated_split, kept_steps
from launch.bench.overlap.pictures import write_overlap_report
from launch.bench.overlap.processor_time import ProcessorTime
from launch.bench.overlap.slow_downs import soonest, target_of_all
from launch.jobfile import read_job
from launch.overlap_tables import overlap_parts
from launch.report.history import History
from launch.shares import LaunchSettings, share_out
from launch.tables import as_markdown
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError

JOB = """
[run]
folder = "{root}/run"
[data]
path = "{root}/data"
cache = "{root}/cache"
[model]
name = "{root}/encoder"
[batch]
queries = 7
[chunk]
tokens = 200
[optim]
steps = 24
lr = 1e-3
[checkpoint]
every_steps = 4
[negatives]
per_query = 2
max_age_steps = 10
when_stale = "wait" # so that versions are swapped, however fast or busy the machine
first_wait_s = 900
[mine]
poll_s = 0.1
[search]
top_k = 20
[sample]
num_negatives = 6
[launch]
train_ranks = 1
"""
TWO, EIGHT = Hardware(2), Hardware(8)
GPUS, ONE_GPU = Hardware(16, ("0", "1", "2", "3")), Hardware(16, ("0",))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("overlap")
    write_tiny_dataset(root / "data")
    write_tiny_encoder(root / "encoder")
    (root / "job.toml").write_text(JOB.format(root=root))
    return root / "job.toml"


def settings_of(word, hardware, launch):
    (division,) = read_shares(word, hardware, launch)
    return dict(division.settings(launch, hardware))


@pytest.mark.parametrize(
    ("hardware", "word", "train", "mine", "settings"),
    [
        (EIGHT, "3", 5, 3, {"mine_cores": 3, "mine_niceness": 0, "train_ranks": 2, "mine_ranks": 1}),
        (TWO, "1", 1, 1, {"mine_cores": 1, "mine_niceness": 0, "train_ranks": 1, "mine_ranks": 1}),
        (TWO, "all", 2, 2, {"mine_cores": None, "mine_niceness": 0}),
        (TWO, "all:7", 2, 2, {"mine_cores": None, "mine_niceness": 7}),
        (GPUS, "1", 3, 1, {"mine_ranks": 1}),
        (ONE_GPU, "0.4", 1, 1, {"train_memory_share": 0.6}),
    ],
)
def test_a_share_says_what_each_side_has(hardware, word, train, mine, settings):
    (division,) = read_shares(word, hardware, LaunchSettings())
    assert (division.train_units, division.mine_units) == (train, mine)
    assert settings_of(word, hardware, LaunchSettings()) == {f"launch.{name}": value for name, value in settings.items()}


def test_shares_that_nobody_names_are_those_that_the_machine_has():
    usual = {h: [division.name for division in read_shares(None, h, LaunchSettings())] for h in (Hardware(1), TWO, EIGHT, GPUS)}
    assert list(usual.values()) == [["all", "all:10"], ["1", "all", "all:10"], ["1", "2", "4", "all", "all:10"], ["1", "2"]]
    assert [division.name for division in read_shares(None, ONE_GPU, LaunchSettings(train_memory_share=0.6))] == ["0.4"]


@pytest.mark.parametrize(
    ("hardware", "words", "said"),
    [
        (TWO, "2", "--shares 2 is none that this machine has, 2 cores; expected 1 for the miner alone, all"),
        (EIGHT, "1,9", "--shares 9 is none that this machine has, 8 cores; expected 1 to 7 for the miner alone"),
        (TWO, "all:20", r"all:N \(the miner at niceness N, 1 to 19\)"),
        (Hardware(1), "1", r"1 core; expected all \(both sides use all\)"),
        (GPUS, "all", "4 GPUs; expected 1 to 3 of them for the miner alone"),
        (ONE_GPU, "1", "1 GPU; expected the miner's share of the GPU's memory, as 0.3"),
        (TWO, " , ", "names no share"),
    ],
)
def test_a_share_that_the_machine_does_not_have_is_refused_with_what_fits(hardware, words, said):
    with pytest.raises(InputError, match=said):
        read_shares(words, hardware, LaunchSettings())


def test_rounds_run_forwards_and_backwards_from_the_trainer_on_the_whole_machine():
    cases = planned(read_shares("1,all", TWO, LaunchSettings()), TWO, rounds=2)
    names = [case.name.removesuffix(f"-round-{case.round}") for case in cases]
    assert names[:6] == ["trainer-2", "trainer-1", "miner-2", "miner-1", "together-1", "together-all"]
    assert names[6:] == names[:6][::-1] and len({case.name for case in cases}) == 12


def test_a_miner_with_cores_of_its_own_leaves_the_others_to_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "mpi_command", lambda num_ranks: [])
    monkeypatch.setattr(local, "cores_in_order", lambda: [0, 4, 1, 5, 2, 6])
    plan = share_out(LaunchSettings(mine_cores=2, mine_niceness=3), cores=6, gpus=())
    assert (plan.threads, plan.mine_threads) == (2, 2)
    assert str(plan) == (
        "2 trainer ranks, 1 miner rank, 2 threads a trainer rank, 2 threads a miner rank on 2 cores of its own; "
        "the miner's niceness is 3"
    )
    trainer, miner = local.sides(tmp_path, tmp_path / "job.toml", plan)
    assert (trainer.cores, miner.cores, miner.niceness) == ({0, 4, 1, 5}, {2, 6}, 3)
    with pytest.raises(InputError, match=r"launch.mine_cores=2 leaves .* 2 cores; set it to 1 at most"):
        share_out(LaunchSettings(mine_cores=2), cores=2, gpus=())
    assert share_out(LaunchSettings(mine_cores=2), cores=2, gpus=(), mines=False).threads == 1


def step(number, ended_at, seconds=1.0, **more):
    return {"step": number, "loss": 1.0, "time": ended_at, "time/step_s": seconds, "negatives/age_steps": None, **more}


@pytest.fixture
def history():
    """Ten steps of a second, of two seconds while the miner refreshes, from 102 to 106; version 1 is mined from step 2."""
    ends = [101, 102, 104, 106, 107, 108, 109, 110, 111, 112]
    seconds = [2 if end in (104, 106) else 1 for end in ends]
    ages = {number: number - 3 for number in range(6, 11)}  # before the 6th step 5 are done, 3 since the checkpoint of step 2
    steps = {n: step(n, end, s) for n, (end, s) in enumerate(zip(ends, seconds, strict=True), start=1)}
    for number, age in ages.items():
        steps[number]["negatives/age_steps"] = age
    versions = {
        0: {"time": 99.0, "seconds": {"publishing": 3.0}},
        1: {"time": 106.0, "seconds": {"encoding": 3.0, "searching": 1.0}},
    }
    return History(steps, {}, [(0, 0), (5, 1)], versions)


def test_steps_beside_a_miner_at_work_are_told_apart(history):
    found = describe_steps(history)
    assert (found["steps"], found["step_s"], found["beside_miner_s"], found["steps_beside_miner"]) == (10, 1, 2, 2)
    assert found["mean_step_s"] == pytest.approx(10 / 8) and (found["begun_at"], found["ended_at"]) == (100, 112)
    assert refresh_seconds(history) == [4.0]


def test_ages_are_those_of_steps_with_mined_negatives(history):
    found = describe_ages(history)
    assert found == {"mean_age_steps": 5, "max_age_steps": 7, "mined_from_step": 6, "versions_swapped": 1}
    none = describe_ages(History({1: step(1, 101)}, {}, [(0, 0)]))
    assert (none["mean_age_steps"], none["max_age_steps"], none["versions_swapped"]) == (None, None, 0)


def test_a_target_is_reached_between_two_evaluations(history):
    minutes = step_times(history, [0, 2, 10], started_at=40.0)
    assert minutes == [1.0, pytest.approx(62 / 60, abs=1e-4), 1.2]
    points = [(1.0, 0.5), (3.0, 0.6), (4.0, 0.55), (5.0, 0.7)]
    assert time_to_reach(0.55, points) == pytest.approx(2.0) and time_to_reach(0.65, points) == pytest.approx(4 + 2 / 3)
    assert time_to_reach(0.4, points) == 1.0 and time_to_reach(0.71, points) is None and time_to_reach(0.5, []) is None


def test_a_target_that_nobody_names_is_what_every_run_reached():
    def course(*scores):
        return [{"minutes": number, "mrr@10": score} for number, score in enumerate(scores)]

    assert target_of_all([course(0.5, 0.7), course(0.5, 0.62)]) == 0.62
    assert target_of_all([course(0.5, 0.7), course(0.5, 0.45)]) is None, "an end below the start is no gain"
    assert target_of_all([course(0.5, 0.7), []]) is None


def test_the_soonest_is_clear_only_where_no_round_of_another_was_as_soon():
    def row(name, *minutes):
        return {"division": name, "words": name, "minutes_to_target": list(minutes)}

    assert soonest([row("a", 5, 6), row("b", 3, 4)]) == {"division": "b", "words": "b", "minutes": 3.5, "is_clear": True}
    assert not soonest([row("a", 4, 6), row("b", 3, 4.5)])["is_clear"]
    assert soonest([row("a", 1, None), row("b", 9, 9)])["division"] == "b" and soonest([row("a", None, 2)]) is None


def test_processor_time_is_taken_between_two_looks():
    taken = ProcessorTime()
    taken._looked_at, taken._seconds = [10.0, 20.0], [{"trainer": 0.0, "miner": 1.0}, {"trainer": 8.0, "miner": 3.0}]
    assert taken.taken(15.0, 20.0) == {"trainer": 4.0, "miner": 1.0}


def test_about_as_many_checkpoints_are_kept_as_are_evaluated():
    assert [kept_steps(10, 48), kept_steps(200, 16_000), kept_steps(200, 100)] == [10, 2000, 200]


def test_without_a_dev_split_another_is_measured_and_named(job):
    jobs = read_job(job, [])
    assert evaluated_split(jobs, {"train", "dev", "test"}, None) == ("dev", None)
    split, note = evaluated_split(jobs, {"train", "test"}, 0.5)
    assert split == "test" and note.startswith("The data have no split dev (eval.dev_split); MRR@10 is measured on test instead")
    assert evaluated_split(jobs, {"train"}, None)[0] is None
    with pytest.raises(InputError, match=r"--target 0.5 cannot be measured: .* there \(train\), or leave out --target"):
        evaluated_split(jobs, {"train"}, 0.5)


@pytest.mark.parametrize(
    ("overrides", "target", "said"),
    [
        (["negatives.per_query=0"], None, "negatives.per_query=0 draws nothing that a miner has found"),
        (["negatives.schedule=[{checkpoint=0,step=0}]"], None, "negatives.schedule fixes when versions come into force"),
        (["mine.bm25_top_k=0"], None, "mine.bm25_top_k=0 makes no version 0"),
        ([], 1.2, "--target 1.2 is no MRR@10; expected a number above 0, and 1 at most"),
        ([], 0.0, "--target 0 is no MRR@10"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(job, tmp_path, overrides, target, said):
    with pytest.raises(InputError, match=said):
        bench_overlap(job, overrides, "all", target, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def measured(job, tmp_path_factory):
    """One real benchmark: both sides alone and together on all cores; and its folder."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.bench.overlap.at_work.REFRESHES", 2)
        patch.setattr(measure, "EVALUATED", 3)
        patch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait for each other leave a busy machine to others
        return bench_overlap(job, [], "all", None, 1, folder), folder


def test_real_runs_are_measured(measured):
    found, folder = measured
    assert [(row["side"], row["seconds"] > 0) for row in found["alone"]] == [("trainer", True), ("miner", True)]
    (row,) = found["divisions"]
    assert row["versions_swapped"] >= 2 and 0 < row["mean_age_steps"] <= row["max_age_steps"]
    assert row["step_slow_down"] > 0 and row["refresh_slow_down"] > 0 and row["refresh_s"] > 0
    assert 0 < row["miner_share"] < 1 and 0 < row["trainer_share"] < 1
    (course,), (alone,) = row["courses"], found["courses_alone"]
    assert [point["step"] for point in course] == [0, 8, 16, 24] == [point["step"] for point in alone]
    assert course[0]["mrr@10"] == alone[0]["mrr@10"], "both begin with the untrained model"
    assert found["split"] == "dev" and found["queries"] == 4
    job = read_job(folder / "runs" / "together-all-round-1" / "job.toml", [])
    assert job.launch.mine_cores is None and job.train.eval.every_steps is None
    assert not list(folder.glob("runs/*-round-1/checkpoints")), "what is large does not stay"


def test_what_was_measured_is_kept_and_gone_on_with(measured, job, monkeypatch):
    found, folder = measured
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("a case was measured again"))
    again = bench_overlap(job, [], "all", 0.01, 1, folder)
    assert again["alone"] == found["alone"]
    assert again["soonest"]["division"] == "all" and again["target_is_given"]


def test_what_was_measured_otherwise_stands_in_no_table_with_it(measured, job):
    _, folder = measured
    with pytest.raises(InputError, match=r"miner-\d+-round-1.json was measured with another job, .* set --out to another folder"):
        bench_overlap(job, ["optim.lr=1e-4"], "all", None, 1, folder)
    file = next(folder.glob("cases/trainer-*.json"))
    kept = file.read_text()
    for name in ("commit", "hardware"):
        changed = json.loads(kept)
        changed["conditions"][name] = "another"
        file.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=f"was measured with another {name}, another, and this one is "):
            bench_overlap(job, [], "all", None, 1, folder)
    file.write_text("{")
    with pytest.raises(InputError, match="is no case that was measured"):
        bench_overlap(job, [], "all", None, 1, folder)
    file.write_text(kept)


def test_the_report_has_tables_and_three_pictures(measured, tmp_path):
    found, _ = measured
    parts = overlap_parts(found)
    write_overlap_report(tmp_path / "report", found, parts)
    said = as_markdown(parts)
    assert "all cores for both" in said and "trainer alone, negatives of BM25" in said and "mined from step" in said
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "overlap.json", "overlap.md", "overlap.png", "overlap-age.png", "overlap-course.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "report" / "overlap.json").read_text())["divisions"][0]["division"] == "all"
