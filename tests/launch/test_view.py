"""What the live view shows of both sides' statuses: in a terminal of any width, and as plain lines elsewhere."""

import io
import time

import pytest
from rich.console import Console

from launch import view as module
from launch.phases import Line, miner_line, next_swap, trainer_line
from launch.view import View

NOW = 1_000_000.0
TRAINER = {
    "pid": 7,
    "phase": "training",
    "step": 42,
    "num_steps": 60,
    "loss": 0.4791,
    "eta_s": 75.2,
    "swaps": [[0, 0], [8, 1], [35, 2]],
    "swaps_before": 0,
    "resumed_step": 0,
    "tokens_per_rank_per_s": 5210.4,
    "checkpoint_every_steps": 10,
    "heartbeat": NOW,
}
MINER = {
    "phase": "encoding",
    "version": 3,
    "checkpoint_step": 40,
    "negatives_version": 2,
    "done": 1917,
    "total": 3869,
    "tokens_per_s": 4100.0,
    "heartbeat": NOW,
}


def viewed(width, trainer, miner, is_terminal=True, times=1):
    """Return what was drawn last in a terminal of a width, and all lines that stay."""
    said = io.StringIO()
    console = Console(file=said, width=width, force_terminal=is_terminal, soft_wrap=True, color_system=None)
    view = View(console)
    for _ in range(times):
        view.show(trainer, miner)
    drawn = Console(width=width, record=True, file=io.StringIO())
    drawn.print(view._lines())
    return drawn.export_text(), said.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_three_lines_fit_any_width_and_say_the_most_important_first(width):
    drawn, said = viewed(width, TRAINER, MINER)
    lines = drawn.rstrip("\n").split("\n")
    assert len(lines) == 3 and all(len(line.rstrip()) <= width for line in lines), "nothing wraps"
    assert "step 42/60   loss 0.479" in lines[0] and lines[1].startswith("miner") and "0:00" in lines[2]
    assert ("5,210 tokens/s a rank" in lines[0]) == (width >= 80)
    assert ("about 1:15 left" in lines[0]) == (width > 40) and ("4,100 tokens/s" in lines[1]) == (width >= 80)
    assert ("next swap: negatives v3, from step 40" in lines[2]) == (width > 40)
    assert max(map(len, said.splitlines())) <= width


def test_start_and_waits_are_told_with_their_time():
    assert trainer_line({}).text == miner_line({}, {}).text == "loading the libraries"
    assert trainer_line({}, 31.0).text == "loading the libraries since 0:31"
    loading = {"phase": "loading the model", "phase_since": NOW - 40, "heartbeat": NOW - 1}
    assert trainer_line(loading, 1.0).text == "loading the model since 0:40"
    waiting = {"phase": "waiting for negatives", "phase_since": NOW - 40, "heartbeat": NOW, "step": 0, "swaps": []}
    assert trainer_line(waiting).text == "waiting for the first negatives since 0:40"
    assert trainer_line({**waiting, "swaps": [[0, 0]]}).text == "waiting for newer negatives since 0:40"
    untrained = {"phase": "evaluating the untrained model", "done": 5, "total": 2000}
    assert trainer_line(untrained).fitted(80) == "evaluating the untrained model   5/2,000 texts a rank"
    assert trainer_line({"phase": "training", "step": 0, "num_steps": 9}).text == "taking step 1/9"
    assert miner_line({**MINER, "phase": "stopped", "total": None}, TRAINER) == Line("stopped")
    assert trainer_line({"phase": "training"}).text == "taking step 1", "a full disk keeps the least"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (7, "; the next is at step 10, in 3 steps"),
        (10, "; the next is at step 20, in 10 steps"),
        (9, "; the next is at step 10, in 1 step"),
    ],
)
def test_a_waiting_miner_says_which_checkpoint_comes(step, said):
    trainer = {"step": step, "num_steps": 60, "checkpoint_every_steps": 10}
    assert miner_line({"phase": "watching"}, trainer).text == f"watching for a checkpoint{said}"
    assert miner_line({"phase": "watching"}, {**trainer, "step": 55}).text.endswith("; no more are mined in this run")
    assert miner_line({"phase": "watching"}, {}).text == "watching for a checkpoint"


def test_the_next_swap_is_named_until_it_is_done():
    assert next_swap(TRAINER, {**MINER, "negatives_version": 3}) == "next swap: negatives v3, mined and ready"
    assert next_swap({"swaps": []}, {"phase": "searching with BM25", "version": 0, "checkpoint_step": None}).endswith(
        "v0, from BM25"
    )
    for trainer, miner in (({**TRAINER, "phase": "finished"}, MINER), (TRAINER, {**MINER, "phase": "watching"}), ({}, {})):
        assert next_swap(trainer, miner) == ""


def test_a_resumed_run_says_new_swaps_only():
    resumed = {**TRAINER, "resumed_step": 40, "swaps_before": 3}
    _, said = viewed(100, resumed, MINER, times=2)
    assert said.count("going on from step 40, with negatives v2") == 1 and "swapped in" not in said
    _, said = viewed(100, {**resumed, "swaps": [*TRAINER["swaps"], [44, 3]]}, MINER, times=2)
    assert said.count("swapped in") == 1 and "step 44: negatives v3 from the miner swapped in" in said
    _, said = viewed(100, TRAINER, MINER, times=2)
    assert said.count("swapped in") == 3 and "step 0: negatives v0 from BM25 swapped in" in said and "going on" not in said


def test_swaps_are_told_again_where_a_crash_has_lost_their_steps():
    said = io.StringIO()
    view = View(Console(file=said, width=100))
    view.show(TRAINER, MINER)
    view.show({}, {})
    view.show({**TRAINER, "pid": 8, "step": 30, "resumed_step": 30, "swaps": TRAINER["swaps"][:2], "swaps_before": 2}, MINER)
    view.show({**TRAINER, "pid": 8, "swaps": [[0, 0], [8, 1], [36, 2]], "resumed_step": 30, "swaps_before": 2}, MINER)
    assert said.getvalue().count("negatives v2 from the miner swapped in") == 2 and "going on from step 30" in said.getvalue()


def test_a_warning_is_a_line_that_stays_and_comes_once():
    warned = [{"kind": "flat", "sentence": "All [texts] look alike.", "step": 3}, {"kind": "x"}, "old"]
    _, said = viewed(60, {**TRAINER, "warnings": warned}, {**MINER, "warnings": "?"}, times=3)
    assert said.count("trainer: All [texts] look alike.") == 1


def test_without_a_terminal_a_side_has_one_line_every_fifteen_seconds(monkeypatch):
    started, out = time.monotonic(), io.StringIO()
    view = View(Console(file=out, width=30))
    for second in range(100, 161, 3):
        monkeypatch.setattr(module.time, "monotonic", lambda at=second: started + at)
        view.show({**TRAINER, "swaps": []}, MINER)
    lines = out.getvalue().splitlines()
    assert sum("trainer step 42/60" in line for line in lines) == sum("miner   encoding" in line for line in lines) == 4
    assert len(lines) == 8 and "\x1b" not in out.getvalue()
