"""What follows the end of a start: the rule, and what batch scripts see of it, where each start is a process of its own."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest

from launch.restarts import CUT, Ended, Past, Start, verdict
from launch.status import describe_run, run_status
from launch.submit import BATCH_FILES
from tests.launch.test_submit import put_in_path
from trainer.handoff.manifest import write_latest

HOW = {"side": "trainer", "limit": 3, "setting": "--max-restarts", "log": "LOG"}


def follow(*ends: Ended):
    """Return what follows the last of several ends, the first of which are followed by another start."""
    past = Past()
    for end in ends[:-1]:
        found = verdict(past, end, **HOW)
        assert found.past is not None, found
        past = found.past
    return verdict(past, ends[-1], **HOW)


def limited(step, gained=True):
    return Ended("stopped", 75, step, gained)


@pytest.mark.parametrize(
    ("phase", "launcher", "code"),
    [("finished", 1, 0), ("refused", 1, 2), ("must not go on", 1, 78), (None, 78, 78), ("training", 2, 2), ("training", 0, 0)],
)
def test_what_a_status_file_says_ends_it_whatever_the_launcher_says(phase, launcher, code):
    found = follow(Ended(phase, launcher, step=7))
    assert (found.code, found.past) == (code, None)


def test_a_month_of_time_limits_ends_no_run():
    assert follow(*(limited(100 * day) for day in range(1, 31))).past == Past()
    # Lost nodes and preemption, seen by nobody, neither.
    assert follow(*(Ended("training", CUT, 100 * day, True) for day in range(1, 31))).past == Past()


def test_only_starts_in_a_row_without_a_new_checkpoint_are_counted():
    died, cut, gained = Ended("preparing", 1), Ended("training", CUT, 5), limited(40)
    assert follow(died, cut, died, gained, died, cut, died).past == Past(fruitless=3)
    found = follow(died, cut, died, gained, died, cut, died, Ended("preparing", 1, checkpoint="step-00000040"))
    assert found.code == 1 and found.past is None
    assert found.sentence == (
        "the trainer was started 4 times in a row without a new checkpoint (--max-restarts=3), and is not started again: "
        "its last words are in LOG; the last checkpoint is step-00000040"
    )


def test_a_crash_that_repeats_at_one_step_ends_it_at_once():
    found = follow(Ended("training", 1, 47, True), Ended("failed", 137, 47, error="why", checkpoint="step-00000040"))
    assert found.code == 78 and found.past is None
    assert found.sentence == (
        "the trainer crashed twice at step 47 (why), and is not started again: its last words are in LOG; "
        "the last checkpoint is step-00000040"
    )
    cut, other = Ended("training", CUT, 44), Ended("training", 1, 45)
    assert follow(Ended("training", 1, 47, True), cut, Ended("training", 1, 47)).code == 78, "no start has passed it since"
    assert follow(Ended("training", 1, 47, True), other, Ended("training", 1, 47)).past is not None
    assert follow(Ended("training", 1, 47, True), limited(60), Ended("training", 1, 47)).past is not None, "it was passed"
    assert follow(Ended("training", CUT, 47, True), Ended("training", CUT, 47)).past is not None, "Slurm ended them"


def test_a_time_limit_before_the_first_step_is_met_twice_and_no_more():
    assert follow(limited(0, False), limited(8), limited(8, False)).past is not None
    for code in (75, 138):  # 138: nobody listened yet
        found = follow(limited(0, False), Ended("preparing", code))
        assert found.code == 78 and "the time limit came before the first step; not started again: set --time" in found.sentence
    assert follow(limited(0, False), Ended("stopped", CUT, 0)).past is not None, "that was preemption"


def test_a_program_that_srun_cannot_start_is_tried_once_more():
    assert follow(Ended(None, 2)).past == Past(fruitless=1, was_mute=True)
    assert follow(Ended(None, 2), Ended(None, 2)).code == 2


def write_run(run, newest=None, lines=0, **status):
    if newest is not None:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_latest(run / "checkpoints", f"step-{newest:08d}")
    (run / "logs").mkdir(parents=True, exist_ok=True)
    with open(run / "logs" / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": lines, "x": "y"}) + "\n" for _ in range(bool(lines)))
    (run / "status").mkdir(exist_ok=True)
    if status:
        (run / "status" / "trainer.json").write_text(json.dumps({"heartbeat": time.monotonic(), **status}))


def test_a_start_is_known_by_what_it_changed(tmp_path):
    write_run(tmp_path, newest=40, lines=47, phase="finished", step=47)
    start = Start.of(tmp_path, "trainer")
    assert start.ended(tmp_path, "trainer", 1) == Ended(None, 1, checkpoint="step-00000040"), "an earlier start's words"
    write_run(tmp_path, phase="preparing", step=0)
    assert start.ended(tmp_path, "trainer", 1).step is None
    write_run(tmp_path, phase="preparing", step=40, num_steps=60)
    assert start.ended(tmp_path, "trainer", 1).step == 40
    write_run(tmp_path, phase="failed", step=47, num_steps=60, heartbeat=start.heartbeat)
    assert start.ended(tmp_path, "trainer", 1).step is None, "an earlier start's step, beside the words of this one"
    write_run(tmp_path, lines=49, phase="training", step=48, num_steps=60)
    assert start.ended(tmp_path, "trainer", 1).step == 49, "the status lags behind"
    write_run(tmp_path, phase="failed", step=45, num_steps=60)
    assert start.ended(tmp_path, "trainer", 1).step == 45, "a checkpoint of step 45 that was not written"
    write_run(tmp_path, newest=50, phase="stopped", step=50)
    assert start.ended(tmp_path, "trainer", 75).gained
    assert not Start(None, 0, None, 0).ended(tmp_path, "miner", 1).gained
    assert Start(None, 0, None, 0).ended(tmp_path, "miner", 75).gained, "it may have had nothing to do"
    write_run(tmp_path, newest=0)
    assert not Start(None, 0, None, 0).ended(tmp_path, "trainer", 75).gained


def ask(run, what, *words, job=1):
    environment = os.environ | {"SLURM_JOB_ID": str(job), "NEGPOOL_MAX_RESTARTS": "1"}
    command = [sys.executable, "-m", "launch.requeue", what, run, "trainer", *words]
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd=BATCH_FILES.parent, capture_output=True, text=True
    )
    return done.stdout.strip(), done.stderr.strip()


def test_batch_scripts_remember_over_their_starts(tmp_path):
    write_run(tmp_path)
    log = tmp_path / "logs" / "slurm-train-1.out"
    log.touch()
    assert ask(tmp_path, "begun") == ("begun", "")
    write_run(tmp_path, newest=40, lines=47, phase="training", step=47)
    assert ask(tmp_path, "ended", "137") == ("again", "")
    assert ask(tmp_path, "begun") == ("begun", "")
    write_run(tmp_path, lines=44, phase="stopped", step=44)
    assert ask(tmp_path, "ended", "cut") == ("again", ""), "Slurm starts it again"
    assert ask(tmp_path, "begun") == ("begun", "")
    write_run(tmp_path, lines=47, phase="training", step=47)
    sentence = (
        f"the trainer crashed twice at step 47, and is not started again: its last words are in {log}; "
        "the last checkpoint is step-00000040"
    )
    assert ask(tmp_path, "ended", "137") == ("over 78", f"negpool: {sentence}")
    told = json.loads((tmp_path / "status" / "trainer.json").read_text())
    (tmp_path / "job.toml").touch()
    assert sentence in describe_run(run_status(tmp_path)), "negpool status says why"
    del told["heartbeat"]
    assert told == {"phase": "must not go on", "step": 47, "error": sentence}
    assert ask(tmp_path, "begun", job=2) == ("begun", ""), "a person has submitted it again"


def test_starts_that_slurm_ends_are_counted_when_the_next_begins(tmp_path):
    assert [ask(tmp_path, "begun")[0] for _ in range(2)] == ["begun"] * 2
    answer, said = ask(tmp_path, "begun")
    assert answer == "over 1" and "started 2 times in a row without a new checkpoint (--max-restarts=1)" in said
    assert ask(tmp_path, "begun") == ("begun", ""), "a person has requeued it"
    (tmp_path / "status" / "trainer.starts.json").unlink()
    (tmp_path / "status").rmdir()
    (tmp_path / "status").write_text("a file")
    answer, said = ask(tmp_path, "begun")
    assert answer == "" and said.startswith("negpool: starts are not counted: cannot write")


SRUN = """
for word; do last=$word; done; run=$(dirname "$last")
cat >"$run/status/trainer.json" <<<'{"phase": "PHASE", "step": 70, "num_steps": 90, "heartbeat": 1}'
echo NEWEST >"$run/checkpoints/LATEST"
exit CODE
"""


@pytest.mark.parametrize("file", ["train.sbatch", "train_and_mine.sbatch"])
@pytest.mark.parametrize(
    ("phase", "newest", "srun", "code", "is_requeued"),
    [
        ("stopped", 70, 75, 75, True),  # a time limit, not the first
        ("training", 70, 1, 1, True),
        ("must not go on", 60, 1, 78, False),
        ("refused", 60, 1, 2, False),
        ("finished", 90, 143, 0, False),
        ("training", 60, 1, 1, False),  # no checkpoint, and none may be missing
    ],
)
def test_a_batch_script_ends_as_the_status_file_says(file, phase, newest, srun, code, is_requeued, tmp_path, monkeypatch):
    run = tmp_path / "a run"
    write_run(run, newest=60)
    answers = (("PHASE", phase), ("NEWEST", f"step-{newest:08d}"), ("CODE", str(srun)))
    script = functools.reduce(lambda text, pair: text.replace(*pair), answers, SRUN)
    miner = 'case "$*" in *"launch mine"*) exit 0;; esac\n'
    programs = {"srun": f"{miner}{script}", "scontrol": f"echo $* >>{tmp_path}/told", "sleep": "exit 0", "scancel": "exit 0"}
    put_in_path(tmp_path, monkeypatch, shell="bash", **programs)
    for name, value in {"JOB_ID": "5", "RESTART_COUNT": "30", "JOB_ID_HET_GROUP_1": "6"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = os.environ | {"NEGPOOL_PYTHON": sys.executable, "NEGPOOL_MAX_RESTARTS": "0"}
    command = ["bash", BATCH_FILES / file, run / "job.toml"]
    ended = subprocess.run(list(map(str, command)), env=environment, cwd=BATCH_FILES.parent, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "told").exists() == is_requeued, ended.stderr
