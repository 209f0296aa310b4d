"""What a search shows of prose and of code, and what the end of a run proposes for either."""

import json
import shlex

import pytest

from launch.hits import hits_text
from launch.next_steps import next_steps
from tests.tiny import write_tiny_dataset
from trainer.data.datasets import open_data
from trainer.handoff.settings import DataSettings

PROSE = "Penguins are flightless birds of the southern hemisphere. " * 12


def hit(name, score, text, title=""):
    return {"id": name, "score": score, "title": title, "excerpt": text}


@pytest.mark.parametrize("width", [60, 80])
def test_prose_is_wrapped_and_spaced_below_its_title_or_first_line(width):
    found = {"query": "birds", "results": [hit("d1", 0.81239, f"Penguins {PROSE}", "Penguins"), hit("f" * 32, -0.05, PROSE)]}
    first, second = hits_text(found, width).plain.split("\n\n")
    assert max(map(len, [*first.splitlines(), *second.splitlines()])) <= width
    assert first.splitlines()[:2] == [" 1.   0.812  Penguins", "            d1"]
    assert first.splitlines()[2].split()[:2] == ["Penguins", "are"] and len(first.splitlines()) == 5 and first.endswith("…")
    assert second.splitlines()[0].startswith(" 2.  -0.050  Penguins are flightless") and "f" * 32 not in second


def test_code_keeps_its_lines():
    code = "def read(path):\n    if path:\n        return open(path)" + ".read()" * 20
    found = {"query_id": "q1", "query": "read a file", "results": [hit("pack/io.py:12:Reader.read", 0.5, code)]}
    lines = hits_text(found, 60).plain.splitlines()
    assert lines[0] == "read a file" and lines[2].endswith("0.500  def read(path):")
    assert lines[3].strip() == "pack/io.py:12:Reader.read" and lines[4] == " " * 16 + "if path:"
    assert lines[5].endswith("…") and len(lines[5]) <= 60


def test_the_example_of_a_search_is_a_query_of_the_data_and_nothing_speaks_of_code(tmp_path):
    data = open_data(DataSettings(path=write_tiny_dataset(tmp_path / "my data"), cache=tmp_path / "cache"), {})
    steps = dict(next_steps(tmp_path / "run", tmp_path / "model", data, "test"))
    words = shlex.split(steps["Search"])
    assert words[:4] == ["negpool", "search", f"{tmp_path}/run", f"{tmp_path}/my data"] and len(words) == 5
    texts = [json.loads(line)["text"] for line in (tmp_path / "my data" / "queries.jsonl").read_text().splitlines()]
    mapped = dict(next_steps(tmp_path / "run", tmp_path / "model", data, "test", {"query": "title", "positive": "body text"}))
    assert shlex.split(mapped["Search"])[4:6] == ["--columns", "query=title,positive=body text"]
    assert words[4] in texts and "code" not in " ".join(steps) and "lines" not in steps["Search"]


def test_functions_are_known_by_their_ids(tmp_path):
    folder = write_tiny_dataset(tmp_path / "data")
    names = {}
    for number, line in enumerate((folder / "corpus.jsonl").read_text().splitlines()):
        names[json.loads(line)["_id"]] = f"pack/io.py:{number}:Reader.read"
    for file in (folder / "corpus.jsonl", *folder.glob("qrels/*.tsv")):
        text = file.read_text()
        for old, new in names.items():
            text = text.replace(f'"{old}"', f'"{new}"').replace(f"\t{old}\t", f"\t{new}\t")
        file.write_text(text)
    data = open_data(DataSettings(path=folder, cache=tmp_path / "cache"), {})
    steps = dict(next_steps(tmp_path / "run", tmp_path / "model", data, "test"))
    assert "read a file as lines" in steps["Search"] and "negpool data code" in steps["Your own code"]
