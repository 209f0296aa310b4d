"""The embedded data set: what is taken, and that nothing of test or dev occurs in training."""

import json

import pytest

from trainer.data.code_search import build_code_search, normalize_code, normalize_query
from trainer.errors import InputError

MODULE = '''
class Reader{n}:
    def read_{n}(self, path):
        """Read number {n} of the files below a folder.

        This paragraph is not part of the query.
        """
        found = []
        for name in path:
            found.append(name + {n})
        return found

    def close(self):
        """Close the file and forget it."""
        self.open = False
        self.number = {n}
        return None

    def __len__(self):
        """Return the number of all files."""
        total = {n}
        total += 1
        return total

def copied(values):
    """Return the values in the order of {n}."""
    ordered = sorted(values)
    ordered.reverse()
    return ordered

def short():
    """Return nothing at all."""
    return None

def undocumented(a):
    b = a
    c = b
    return c
'''


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source" / "package"
    (folder / "tests").mkdir(parents=True)
    for n in range(60):
        (folder / f"module{n}.py").write_text(MODULE.replace("{n}", str(n)))
    (folder / "tests" / "helper.py").write_text(MODULE.replace("{n}", "1000"))
    (folder / "broken.py").write_text("def broken(:\n")
    (folder / "latin.py").write_bytes(b"# \xff\n")
    return tmp_path / "source"


def read(folder):
    texts = {}
    for name in ("corpus", "queries"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        texts[name] = {row["_id"]: row["text"] for row in rows}
        assert len(texts[name]) == len(rows)
    splits = {}
    for split in ("train", "dev", "test"):
        lines = (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
        splits[split] = [line.split("\t")[:2] for line in lines]
    return texts, splits


def test_a_function_is_found_by_its_first_paragraph_without_its_docstring(source, tmp_path):
    counts = build_code_search(tmp_path / "out", sources=[source])
    texts, splits = read(tmp_path / "out")
    of_query = {texts["queries"][q]: [] for rows in splits.values() for q, _ in rows}
    for rows in splits.values():
        for query, passage in rows:
            of_query[texts["queries"][query]].append(passage)
    (passage,) = of_query["Read number 7 of the files below a folder."]
    assert passage == "package/module7.py:3:Reader7.read_7"
    assert texts["corpus"][passage].startswith("def read_7(self, path):\n    found = []\n    for name")
    assert len(of_query["Close the file and forget it."]) == 60, "one query for a docstring, several positives"
    assert counts["unreadable_files"] == 2
    assert counts["functions"] == 180, "no dunder, no short, no undocumented function, none of the tests"


def test_nothing_of_test_or_dev_occurs_in_training(source, tmp_path):
    build_code_search(tmp_path / "out", sources=[source])
    texts, splits = read(tmp_path / "out")
    seen = {
        split: (
            {normalize_query(texts["queries"][q]) for q, _ in rows},
            {normalize_code(texts["corpus"][p]) for _, p in rows},
        )
        for split, rows in splits.items()
    }
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        for kind in (0, 1):
            assert seen[one][kind] and not seen[one][kind] & seen[other][kind]
    # The body of `copied` is the same in all files: all its docstrings are in one split.
    assert sum(any("in the order of" in texts["queries"][q] for q, _ in rows) for rows in splits.values()) == 1


def test_the_same_code_gives_the_same_data_set(source, tmp_path):
    for out in ("a", "b"):
        build_code_search(tmp_path / out, sources=[source], max_functions=80, seed=3)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len((tmp_path / "a" / "corpus.jsonl").read_text().splitlines()) <= 80


def test_what_cannot_be_built_is_one_sentence_and_leaves_nothing(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty; give --out a new folder"):
        build_code_search(tmp_path / "full", sources=[source])
    with pytest.raises(InputError, match="is not a folder"):
        build_code_search(tmp_path / "out", sources=[tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no documented functions"):
        build_code_search(tmp_path / "out", sources=[tmp_path / "empty"])
    assert not (tmp_path / "out").exists()
