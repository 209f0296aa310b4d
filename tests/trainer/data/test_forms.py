"""Every form of data becomes the same tables, and what is wrong with it is one sentence with file and place."""

import gzip
import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import write_tiny_dataset
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

QUERIES = ["how to sort", "open a file", "how to sort", "parse a date"]
POSITIVES = ["sort a list", "the open call", "order of values", "dates in words"]
NEGATIVES = [["the open call", "a hash"], ["a tree"], ["a hash"], ["sort a list", "a tree"]]
TEACHER = [[0.9, 0.2, 0.1], [0.8, 0.3], [0.7, 0.4], [0.6, 0.5, -0.5]]


def pairs(i, scores=False):
    names = {f"negative_{n + 1}": text for n, text in enumerate(NEGATIVES[i])}
    return {"anchor": QUERIES[i], "positive": POSITIVES[i], **names, **({"scores": TEACHER[i]} if scores else {})}


def tevatron(i, scores=False):
    def passage(place, text):
        return {"docid": f"d-{text}", "title": "", "text": text, **({"score": TEACHER[i][place]} if scores else {})}

    return {
        "query_id": f"q-{QUERIES[i]}",
        "query": QUERIES[i],
        "positive_passages": [passage(0, POSITIVES[i])],
        "negative_passages": [passage(n + 1, text) for n, text in enumerate(NEGATIVES[i])],
    }


def flagembedding(i, scores=False):
    scored = {"pos_scores": TEACHER[i][:1], "neg_scores": TEACHER[i][1:]} if scores else {}
    return {"query": QUERIES[i], "pos": [POSITIVES[i]], "neg": NEGATIVES[i], **scored}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_array(path, records):
    path.write_text(json.dumps(list(records), indent=1))
    return path


def write_parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {name: None for record in records for name in record}
    pq.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), path)
    return path


def save_dataset(path, records):
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path


def save_splits(path, records):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(str(path))
    return path


WRITERS = {
    "data.jsonl": write_lines,
    "data.jsonl.gz": write_lines,
    "data.json": write_array,
    "data.parquet": write_parquet,
    "saved": save_dataset,
    "splits": save_splits,
    "folder/train-00000-of-00001.parquet": write_parquet,
    "clone/data/train.jsonl": write_lines,
}
FORMS = {"pairs": pairs, "tevatron": tevatron, "flagembedding": flagembedding}


def texts_judged(data, split="train"):
    """The texts of every query's positives and given negatives, with the teacher's scores."""
    queries, corpus, qrels = data.queries["text"], data.corpus["text"], data.qrels[split]
    positives, negatives = {}, {}
    for query, passage, teacher in zip(qrels.query_rows, qrels.corpus_rows, qrels.teacher, strict=True):
        positives.setdefault(queries[int(query)], {})[corpus[int(passage)]] = float(teacher)
    for query in range(len(queries)):
        at = slice(data.given.indptr[query], data.given.indptr[query + 1])
        scored = zip(data.given.ids[at], data.given.scores[at], strict=True)
        negatives[queries[query]] = {corpus[int(i)]: float(score) for i, score in scored}
    return positives, negatives


EXPECTED_POSITIVES = {
    "how to sort": {"sort a list": 0.9, "order of values": 0.7},
    "open a file": {"the open call": 0.8},
    "parse a date": {"dates in words": 0.6},
}
EXPECTED_NEGATIVES = {
    "how to sort": {"the open call": 0.2, "a hash": 0.4},  # named twice: the higher score
    "open a file": {"a tree": 0.3},
    "parse a date": {"sort a list": 0.5, "a tree": -0.5},
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_kind_of_file_gives_the_same_texts_judgements_and_scores(tmp_path, form, name):
    path = WRITERS[name](tmp_path / name, [FORMS[form](i, scores=True) for i in range(4)])
    if "/" in name:
        path = tmp_path / name.split("/")[0]
    data = open_dataset(path, tmp_path / "cache")
    assert data.form == form
    assert len(data.queries) == 3 and len(data.corpus) == 6, "equal texts are one row"
    for found, expected in zip(texts_judged(data), (EXPECTED_POSITIVES, EXPECTED_NEGATIVES), strict=True):
        assert found.keys() == expected.keys()
        for query in expected:
            assert found[query] == pytest.approx(expected[query])
    assert check_dataset(path).problems == []


@pytest.mark.parametrize("form", FORMS)
def test_without_a_teacher_no_score_is_made_up(tmp_path, form):
    data = open_dataset(write_lines(tmp_path / "data.jsonl", [FORMS[form](i) for i in range(4)]), tmp_path / "cache")
    assert np.isnan(data.qrels["train"].teacher).all() and np.isnan(data.given.scores).all()
    assert {q: set(p) for q, p in texts_judged(data)[1].items()} == {q: set(p) for q, p in EXPECTED_NEGATIVES.items()}


def test_ids_of_a_file_are_kept_and_others_follow_from_the_text(tmp_path):
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [tevatron(i) for i in range(4)]), tmp_path / "cache")
    assert data.corpus["_id"][0] == "d-sort a list" and data.queries["_id"][1] == "q-open a file"
    one = open_dataset(write_lines(tmp_path / "b.jsonl", [pairs(0), pairs(1)]), tmp_path / "cache")
    other = open_dataset(write_lines(tmp_path / "c.jsonl", [pairs(1), pairs(2)]), tmp_path / "cache")
    ids = [dict(zip(data.corpus["text"], data.corpus["_id"], strict=True)) for data in (one, other)]
    assert ids[0]["the open call"] == ids[1]["the open call"] and len(set(ids[0].values())) == len(ids[0])


def test_files_and_parts_named_so_are_splits_and_share_their_texts(tmp_path):
    for name, rows in {"train": [0, 1], "validation-00000": [2], "test": [3, 0]}.items():
        write_lines(tmp_path / "files" / f"{name}.jsonl", [pairs(i) for i in rows])
    parts = {name: datasets.Dataset.from_list([pairs(i) for i in r]) for name, r in {"train": [0, 1], "validation": [2]}.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "dict"))
    data = open_dataset(tmp_path / "files", tmp_path / "cache")
    assert sorted(data.qrels) == ["dev", "test", "train"] and len(data.queries) == 3
    assert set(texts_judged(data, "dev")[0]) == {"how to sort"} and len(data.qrels["test"].query_rows) == 2
    assert "shares_queries_with" in check_dataset(tmp_path / "files").statistics["qrels-test"]
    assert sorted(open_dataset(tmp_path / "dict", tmp_path / "cache").qrels) == ["dev", "train"]


def test_a_prompt_stands_before_its_query_and_a_title_before_its_text(tmp_path):
    record = flagembedding(0) | {"prompt": "Represent: "}
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "cache")
    assert data.queries["text"] == ["how to sort"] and data.queries["prompt"] == ["Represent: "]
    record = tevatron(0)
    record["positive_passages"][0]["title"] = "Lists"
    data = open_dataset(write_lines(tmp_path / "b.jsonl", [record]), tmp_path / "cache")
    assert data.corpus["text"][0] == "Lists sort a list"


def test_a_pairs_score_is_its_grade(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"anchor": "q", "positive": "p", "score": 3}])
    assert open_dataset(path, tmp_path / "cache").qrels["train"].scores.tolist() == [3]


def test_a_positive_is_never_a_given_negative(tmp_path):
    records = [flagembedding(0) | {"neg": ["sort a list", "order of values", "a hash"]}, flagembedding(2) | {"neg": ["a tree"]}]
    _, negatives = texts_judged(open_dataset(write_lines(tmp_path / "a.jsonl", records), tmp_path / "cache"))
    assert set(negatives["how to sort"]) == {"a hash", "a tree"}


def change(record, **values):
    return {name: value for name, value in (record | values).items() if value is not ...}


BAD = {
    "not JSON": (["{", pairs(1)], r"a\.jsonl:1: this line is not JSON"),
    "half a character": ([pairs(0), '{"anchor": "\\ud800", "positive": "x"}'], r"a\.jsonl:2: half a surrogate pair"),
    "not an object": ([pairs(0), [1]], r"a\.jsonl:2: expected an object"),
    "another form": (
        [{"text_a": "x", "text_b": "y"}],
        r"anchor is missing; .*--columns query=text_a,positive=text_b, or",
    ),
    "misspelt column": ([{"anchr": "x", "positive": "y"}], r"anchor is missing; did you mean it by 'anchr'\?"),
    "misspelt negative": (
        [change(pairs(0), negatve="x", negative_1=...)],
        r"column negatve, .*looks like a negative",
    ),
    "no anchor": ([pairs(0), {"positive": "y"}], r"a\.jsonl:2: found the columns positive; anchor is missing; say which"),
    "column misspelt later": ([pairs(0), {"anchor": "x", "postive": "y"}], r"positive is missing; .*mean it by 'postive'"),
    "wrong type": ([pairs(0), change(pairs(1), positive=[3])], r"a\.jsonl:2: positive holds 3; expected a text, a list of"),
    "two anchors": ([change(pairs(0), anchor=["x", "y"])], r"a\.jsonl:1: anchor is \['x', 'y'\]; expected a string"),
    "passages of numbers": (
        [change(tevatron(0), negative_passages=[1])],
        r"negative_passages holds 1; .* list of \{docid",
    ),
    "passages without text": (
        [change(tevatron(0), negative_passages=[{"body": "x"}])],
        r"negative_passages has a passage",
    ),
    "score in words": ([change(pairs(0), scores=["a", 1, 2])], r"scores holds 'a'; expected a finite number"),
    "score not finite": ([change(pairs(0), scores=[math.nan, 1, 2])], r"scores holds nan; expected a finite number"),
    "too few scores": ([change(pairs(0), scores=[1])], r"scores is 1 long; expected 3 numbers"),
    "half of the scores": ([change(flagembedding(0, True), neg_scores=...)], r"neg_scores is missing; expected 2 numbers"),
    "scores of some rows": (
        [pairs(0, True), pairs(1)],
        r"a\.jsonl:2: found no scores, expected scores as in .*a\.jsonl:1; give every record its scores, or take them from all",
    ),
    "scores of later rows": (
        [flagembedding(0), flagembedding(1, True)],
        r":2: found pos_scores and .*, expected no scores",
    ),
    "two texts of an id": (
        [tevatron(0), change(tevatron(1), query_id="q-how to sort")],
        r"a\.jsonl:2: id 'q-how to sort' has another text than at line 1",
    ),
    "empty": ([], r"a\.jsonl: this file has no sound record"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_refused_with_file_and_line_and_leave_nothing(tmp_path, case):
    records, sentence = BAD[case]
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(tmp_path / "a.jsonl", tmp_path / "cache")
    assert "\n" not in str(error.value) and str(tmp_path / "a.jsonl") in str(error.value)
    assert not list((tmp_path / "cache").glob("data-*")), "nothing half-written"
    assert any(str(error.value) == str(problem) for problem in check_dataset(tmp_path / "a.jsonl").problems)


def test_a_problem_in_a_table_names_its_row(tmp_path):
    records = [pairs(1, True), pairs(1, True) | {"scores": [0.5]}]
    path = write_parquet(tmp_path / "a.parquet", records)
    with pytest.raises(InputError, match=r"a\.parquet, row 2: scores is 1 long"):
        open_dataset(path, tmp_path / "cache")
    assert check_dataset(path).as_json()["problems"][0]["row"] == 2
    with pytest.raises(InputError, match=r"a\.json, row 2: scores is 1 long"):
        open_dataset(write_array(tmp_path / "a.json", records), tmp_path / "cache")


def test_a_file_that_ends_early_is_refused(tmp_path):
    records = [pairs(i % 4) for i in range(400)]
    whole = {
        "a.jsonl": write_lines(tmp_path / "a.jsonl", records),
        "a.jsonl.gz": write_lines(tmp_path / "a.jsonl.gz", records),
        "a.json": write_array(tmp_path / "a.json", records),
        "a.parquet": write_parquet(tmp_path / "a.parquet", records),
        "saved": next(save_dataset(tmp_path / "saved", records).glob("*.arrow")),
    }
    sentences = {
        "a.jsonl": r"a\.jsonl:\d+: this line is not JSON",
        "a.jsonl.gz": r"a\.jsonl\.gz: this gzip file is cut off",
        "a.json": r"a\.json: this file is not JSON",
        "a.parquet": r"a\.parquet: this file is no whole Parquet file",
        "saved": r"arrow: this file is no whole Arrow file",
    }
    for name, file in whole.items():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(InputError, match=sentences[name]) as error:
            open_dataset(tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("data-*"))


def test_what_is_no_data_set_is_said_with_the_forms_that_are(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt is no \.jsonl.*BEIR .*anchor, positive"):
        open_dataset(tmp_path / "notes.txt", tmp_path / "cache")
    with pytest.raises(InputError, match=r"holds no file of a data set; set data\.path to BEIR"):
        open_dataset(tmp_path, tmp_path / "cache")
    write_lines(tmp_path / "mixed" / "train.jsonl", [pairs(0)])
    write_lines(tmp_path / "mixed" / "extra.jsonl", [pairs(0)])
    with pytest.raises(InputError, match=r"extra\.jsonl names no split, and others beside it do"):
        open_dataset(tmp_path / "mixed", tmp_path / "cache")
    save_dataset(tmp_path / "saved", [pairs(0)])
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match=r"\.arrow is missing, and state\.json beside it names it"):
        open_dataset(tmp_path / "saved", tmp_path / "cache")
    for content in ("{", "[]", "{}"):
        (tmp_path / "saved" / "state.json").write_text(content)
        with pytest.raises(InputError, match=r"state\.json does not list _data_files of a saved data set"):
            open_dataset(tmp_path / "saved", tmp_path / "cache")


def test_folders_below_are_splits_or_the_one_that_has_data(tmp_path):
    for split in ("train", "validation"):
        write_lines(tmp_path / "splits" / split / "part-0.jsonl", [pairs(0)])
    assert sorted(open_dataset(tmp_path / "splits", tmp_path / "cache").qrels) == ["dev", "train"]
    write_parquet(tmp_path / "config" / "pair" / "train-00000-of-00001.parquet", [pairs(i) for i in range(3)])
    (tmp_path / "config" / ".cache").mkdir()
    assert len(open_dataset(tmp_path / "config", tmp_path / "cache").queries) == 2
    write_tiny_dataset(tmp_path / "tiny" / "tiny")
    assert open_dataset(tmp_path / "tiny", tmp_path / "cache").form == "BEIR"
    write_parquet(tmp_path / "config" / "triplet" / "train-00000-of-00001.parquet", [pairs(0)])
    with pytest.raises(InputError, match=r"config holds the data sets pair, triplet; set data\.path to one of them, as .*pair$"):
        open_dataset(tmp_path / "config", tmp_path / "cache")


def test_a_name_of_the_hub_without_network_is_one_sentence(tmp_path, monkeypatch):
    def unreachable(*name):
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"nothing: .* not on this machine, and the hub has not given it: ") as error:
        open_dataset(type(tmp_path)("nobody/nothing"), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_is_read_from_the_files_that_datasets_keeps(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", [pairs(i) for i in range(4)])
    kept = datasets.load_dataset("json", data_files={"validation": str(file)}, cache_dir=str(tmp_path / "hub"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or kept)
    data = open_dataset(type(tmp_path)("somebody/pairs:triplet"), tmp_path / "cache")
    assert asked == [("somebody/pairs", "triplet")]
    assert list(data.qrels) == ["dev"] and len(data.corpus) == 6
