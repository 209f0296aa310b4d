"""The supervisor goes by what a side left in its status file first and by its code second; sides are real processes here."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import pytest
from rich.console import Console

from launch import local
from launch.early import mpiexec_path
from launch.local import Side, TrainerDied, supervise
from launch.restarts import Start, last_words, size_of
from launch.shares import LaunchSettings, Shares
from launch.view import View
from trainer.errors import InputError, MustNotGoOn, RunInUse

# The n-th start does what the n-th line of its plan says; the last one is repeated.
SIDE = """
import json, pathlib, sys
run, name = pathlib.Path(sys.argv[1]), sys.argv[2]
plan = [json.loads(line) for line in (run / f"{name}.plan").read_text().splitlines()]
starts = run / f"{name}.starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
code, said, checkpoint = plan[min(number, len(plan) - 1)]
if checkpoint is not None:
    folder = run / "checkpoints" / f"step-{checkpoint:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    (run / "checkpoints" / "LATEST").write_text(folder.name)
if said is not None:
    (run / "status" / f"{name}.json").write_text(json.dumps({"heartbeat": number, **said}))
sys.exit(code)
"""
# A trainer that ends a moment after the miner's last start.
WAIT = """
import time
miner = run / "miner.starts"
while name == "trainer" and not (miner.exists() and len(miner.read_text()) == {starts}):
    time.sleep(0.01)
time.sleep(0.5 * (name == "trainer"))
"""
DONE = 0, {"phase": "finished"}, None


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "status").mkdir()
    monkeypatch.setattr(local, "POLL_S", 0.01)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in kept.items():
        signal.signal(number, handler)


def supervised(run, monkeypatch, trainer, miner=((0, {"phase": "finished"}, None),), max_restarts=3, mine_ranks=1):
    """Return how a run with such starts of its sides ended, how often each started, and what was said."""

    def side(name, plan):
        (run / f"{name}.plan").write_text("\n".join(json.dumps(start) for start in plan))
        return Side(name, [sys.executable, "-S", "-c", SIDE, str(run), name], dict(os.environ), run / f"{name}.log")

    monkeypatch.setattr(local, "sides", lambda *_: (side("trainer", trainer), side("miner", miner)))
    said = io.StringIO()
    with View(Console(file=said, width=500)) as view:
        try:
            how = supervise(run, run / "job.toml", LaunchSettings(max_restarts=max_restarts), Shares(1, mine_ranks, 1), view)
        except Exception as error:
            how = error
    starts = [len(file.read_text()) if (file := run / f"{name}.starts").exists() else 0 for name in ("trainer", "miner")]
    return how, starts, said.getvalue()


def at(step, phase="training", **more):
    return {"phase": phase, "step": step, "num_steps": 100, **more}


@pytest.mark.parametrize(
    ("start", "ends"),
    [
        ((1, at(3, "refused", error="no such data"), None), InputError("no such data")),
        ((1, at(3, "must not go on", error="collapsed"), None), MustNotGoOn("collapsed")),
        ((1, at(3, "stopped"), 3), "stopped"),
        ((1, at(100, "finished"), 100), "finished"),
        # What no launcher has hidden, where nothing was told.
        ((2, at(3), None), InputError("the trainer ended with code 2; its last words are in {run}/trainer.log")),
        ((78, at(3), None), MustNotGoOn("the trainer ended with code 78; its last words are in {run}/trainer.log")),
        ((75, at(3), None), "stopped"),
        ((0, at(3), None), "finished"),
    ],
)
def test_the_phase_decides_and_then_the_code(run, monkeypatch, start, ends):
    how, (starts, _), _ = supervised(run, monkeypatch, [start])
    assert starts == 1
    if isinstance(ends, str):
        assert how == ends
    else:
        assert type(how) is type(ends) and str(how) == str(ends).format(run=run)


def test_the_same_crash_twice_at_one_step_is_not_repeated_a_third_time(run, monkeypatch):
    full = (1, at(40, "failed", error="no room left on the disk; free some space"), 20)
    how, (starts, _), said = supervised(run, monkeypatch, [full])
    assert starts == 2 and type(how) is MustNotGoOn and said.count("started again, from the checkpoint step-00000020") == 1
    assert str(how).startswith("the trainer crashed twice at step 40 (no room left on the disk; free some space)")
    assert f"its last words are in {run}/trainer.log; the last checkpoint is step-00000020" in str(how)


@pytest.mark.parametrize(
    "starts",
    [
        [(1, at(40), 20), (1, at(41), 20), (1, at(40), 20), DONE],  # now here, now there
        [(1, {"phase": "preparing", "step": 0}, 20)] * 3 + [DONE],  # before its first step: a machine may need a while
        [(1, at(40), 20), (1, None, None), (1, at(41), 20), DONE],  # what the first start said is forgotten
        [(1, at(n), n) for n in range(10, 80, 10)] + [DONE],  # each leaves a newer checkpoint
        [(-9, at(5), None), DONE],
    ],
)
def test_other_crashes_are_started_again(run, monkeypatch, starts):
    how, found, _ = supervised(run, monkeypatch, starts)
    assert how == "finished" and found[0] == len(starts)


def test_a_trainer_that_dies_too_often_ends_the_run(run, monkeypatch):
    how, found, _ = supervised(run, monkeypatch, [(1, at(n), None) for n in range(9)], max_restarts=2)
    assert (
        type(how) is TrainerDied and found[0] == 3 and "started 3 times in a row without a new checkpoint (launch.max" in str(how)
    )


@pytest.mark.parametrize(
    ("end", "starts", "words"),
    [
        ((1, {"phase": "refused", "error": "no [/data] there"}, None), 1, "cannot go on (no [/data] there); training goes on"),
        ((2, None, None), 2, "the miner cannot go on (the miner ended with code 2; its last words are in"),
        ((78, None, None), 1, "the miner cannot go on (the miner ended with code 78; its last words are in"),
        ((1, {"phase": "failed", "error": "no room left"}, None), 4, "was started 4 times in a row without new negatives"),
    ],
)
def test_a_miner_that_cannot_go_on_leaves_the_trainer_alone(run, monkeypatch, end, starts, words):
    monkeypatch.setitem(globals(), "SIDE", SIDE.replace("code, said", f"{WAIT.format(starts=starts)}code, said", 1))
    how, found, said = supervised(run, monkeypatch, [DONE], [end])
    assert how == "finished" and found == [1, starts] and words in said


def test_what_kept_mpiexec_from_starting_the_miner_is_said(run, tmp_path):
    log, as_root = tmp_path / "miner.log", ["--allow-run-as-root"] * (os.geteuid() == 0)
    refused = {
        "There are not enough slots available in the system to satisfy the 99 slots": [*as_root, "-n", "99", "true"],
        "was unable to find the specified executable file": [*as_root, "-n", "1", "no_such_program"],
        "exited on signal 9 (Killed).": [*as_root, "-n", "1", "sh", "-c", "kill -9 $$"],
    }
    for sentence, words in refused.items():
        begin = size_of(log)
        with open(log, "ab") as out:
            subprocess.run([mpiexec_path(), *words], stdout=out, stderr=out)
        assert sentence in last_words(log, begin) and "---" not in last_words(log, begin)
    with open(log, "a") as out:
        out.write("negpool: no such data\n")
    assert last_words(log, 0) == "no such data" and last_words(log, size_of(log)) == last_words(run / "none", 0) == ""


def test_a_side_that_another_run_has_taken_meanwhile_is_not_started_again(run, monkeypatch):
    monkeypatch.setattr(local, "GONE_AFTER_S", 0.0)
    said = io.StringIO()
    with View(Console(file=said, width=500)) as view, contextlib.ExitStack() as locks:
        for name in ("trainer", "miner"):
            locks.enter_context(filelock.FileLock(run / "status" / f"{name}.lock"))
        sides = {name: Side(name, ["never"], {}, run / "log", found=Start.of(run, name)) for name in ("trainer", "miner")}
        with pytest.raises(RunInUse, match="another trainer is at work in"):
            local._after_trainer(run, sides["trainer"], 1, LaunchSettings(), view)
        local._after_miner(run, sides["miner"], 1, LaunchSettings(), view)
    assert "another miner is at work in" in said.getvalue() and "training goes on with the negatives" in said.getvalue()


# Sides that save for as long as nobody kills them.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run / f"{name}.deaf").touch()
time.sleep(600)
"""


def test_a_second_ctrl_c_ends_both_sides_at_once_and_signals_mean_again_what_they_did(run, monkeypatch):
    monkeypatch.setitem(globals(), "SIDE", SIDE.replace("code, said", f"{DEAF}code, said", 1))
    handler = signal.getsignal(signal.SIGINT)

    def press_twice(poll_s):
        deaf = all((run / f"{name}.deaf").exists() for name in ("trainer", "miner"))
        if deaf and presses:
            presses.pop()
            signal.raise_signal(signal.SIGINT)
        time.sleep(poll_s)

    presses = [1, 2]
    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=press_twice, monotonic=time.monotonic))
    found = []
    start = Side.start
    monkeypatch.setattr(Side, "start", lambda side, run: (start(side, run), found.append(side.process)))
    how, _, said = supervised(run, monkeypatch, [DONE], [DONE])
    assert how == "stopped" and "Ctrl-C once more ends them at once" in said and not presses
    assert [process.poll() for process in found] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_swaps_that_an_earlier_start_has_told_are_not_told_again(run, monkeypatch):
    (run / "status" / "trainer.json").write_text(json.dumps(at(90, swaps=[[0, 0], [80, 1]])))
    how, _, said = supervised(run, monkeypatch, [(1, at(160, swaps=[[0, 0], [80, 1], [160, 2]]), 160), DONE])
    assert how == "finished" and said.count("swapped in") == 1 and "step 160: negatives v2 from the miner swapped in" in said


def test_the_folder_of_a_run_at_work_is_left_alone(run, monkeypatch):
    (run / "status" / "trainer.json").write_text('{"phase": "training"}')
    with filelock.FileLock(run / "status" / "trainer.lock"):
        how, found, _ = supervised(run, monkeypatch, [DONE])
    assert type(how) is RunInUse and found == [0, 0]
    assert (run / "status" / "trainer.json").read_text() == '{"phase": "training"}'


def test_a_trainer_alone_starts_no_miner(run, monkeypatch):
    how, starts, said = supervised(run, monkeypatch, [(1, at(3), 3), DONE], mine_ranks=0)
    assert (how, starts) == ("finished", [2, 0]) and "the miner" not in said
