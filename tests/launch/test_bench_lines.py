"""A list of measurements: each stands alone against errors, hanging, death and the clock."""

import itertools
import multiprocessing

import pytest

from launch.bench import lines
from launch.bench.lines import Line, measure_lines
from launch.gpu_tables import gpu_parts
from launch.tables import as_markdown
from tests.launch import bench_lines

FOUND = {"device": "a GPU", "precision": "bf16", "rounds": 3, "seconds": 12.3}


def line(measure, limit_s=60.0, **more):
    return Line(measure.__name__, measure, limit_s, **more)


@pytest.fixture(scope="module")
def rows():
    """What a list finds in which nearly everything goes wrong."""
    wrong = [line(bench_lines.fails), line(bench_lines.dies), line(bench_lines.too_large)]
    listed = [line(bench_lines.good), line(bench_lines.absent), line(bench_lines.process), line(bench_lines.hangs, 0.2), *wrong]
    told = []
    found = measure_lines([*listed, line(bench_lines.process)], ("ms",), 300, lambda what, rows: told.append((what, len(rows))))
    assert told[:2] == [("good", 2), ("absent", 3)] and told[-1] == ("process", len(found)), "kept behind every line"
    return found


def test_a_line_that_goes_wrong_says_why_in_a_word_and_ends_nothing(rows):
    words = {row["what"]: row["word"] for row in rows if row["found"] is None}
    assert words == {
        "absent": "no such library",
        "hangs": "more than 0 s",
        "fails": "ValueError: what was found",
        "dies": "its process died (7)",
        "too_large": "out of memory",
    }
    assert [row["found"] for row in rows[:2]] == [1.5, 2.0] and rows[0]["unit"] == "ms"
    assert "in fails" in next(row["error"] for row in rows if row["what"] == "fails"), "the whole error is in the file"
    assert not multiprocessing.active_children()


def test_lines_share_a_process_until_one_fails(rows):
    first, last = (row["found"] for row in rows if row["what"] == "process")
    assert first != last


def test_a_line_that_there_is_no_time_for_is_not_begun(monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(lines.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(lines, "_Worker", None)  # calling it would fail
    (row,) = measure_lines([line(bench_lines.good, needs_s=30)], ("ms",), 20, lambda *_: None)
    assert row["found"] is None and row["word"].startswith("no time left")


def test_the_table_sets_what_was_found_beside_what_was_wanted(rows):
    below = dict(rows[0], what="third", found=0.4, wanted=0.5, less_is_better=True)
    said = as_markdown(gpu_parts(FOUND | {"rows": [*rows, below]}))
    assert "| first | 1.5 | >= 1 | ms |" in said and "| second | 2 |  | ms |" in said
    assert "| third | 0.4 | <= 0.5 | ms |" in said and "| dies |  |  | its process died (7) |" in said
    assert "2 of 2 figures with a wanted one reach it." in said and "a GPU, bf16, medians of 3, 12 s in all" in said
