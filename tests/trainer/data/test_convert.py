"""Every form that we write is read back as what the tables held, but for what the form has no place for, which is said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch.commands import app
from trainer.data.convert import convert_data
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

FORMS = ["beir", "sentence-transformers", "tevatron", "flagembedding"]
RECORDS = FORMS[1:]


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def beir(folder):
    """Two splits, titles, a title alone, grades, a judgement of 0, a passage and a query that nobody judged, an odd text."""
    corpus = [("d1", "Sorting", "a list: quickly"), ("d2", "", "open a file"), ("d3", "Dates", ""), ("d4", "", "nobody's")]
    corpus += [("d5", "T", 'ünïcode "quoted" \\ line\nbreak\u2028 and\ttab'), ("d6", "", "a hash")]
    write_lines(folder / "corpus.jsonl", [{"_id": i, "title": title, "text": text} for i, title, text in corpus])
    queries = [("q1", "how to sort"), ("q2", "open"), ("q3", "dates"), ("q4", "unjudged"), ("q5", "no relevant one")]
    write_lines(folder / "queries.jsonl", [{"_id": i, "text": text} for i, text in queries])
    (folder / "qrels").mkdir()
    lines = {"train": ["q1 d1 2", "q1 d5 1", "q2 d2 1", "q2 d6 0", "q5 d6 0"], "test": ["q3 d3 0.1", "q2 d5 3"]}
    for split, judged in lines.items():
        text = "".join(line.replace(" ", "\t") + "\n" for line in ["query-id corpus-id score", *judged])
        (folder / f"qrels/{split}.tsv").write_text(text)
    return folder


def tevatron(path):
    """Ids, titles, a teacher's scores that are not short as decimals; a query with the id of a passage; one in two records."""

    def passages(*names, start):
        scores = [np.float32((start + place) / 7).item() for place in range(len(names))]
        titled = [(name, f"Title {name}" if name in "ac" else "", f"text of {name}") for name in names]
        return [dict(zip(("docid", "title", "text", "score"), (*t, s), strict=True)) for t, s in zip(titled, scores, strict=True)]

    rows = [("q1", "abc", "de"), ("c", "d", "ab"), ("q1", "ag", "d"), ("q3", "gb", "fc")]
    records = [
        {
            "query_id": query,
            "query": f"query {query}",
            "positive_passages": passages(*positives, start=10 * number),
            "negative_passages": passages(*negatives, start=-10 * number),
        }
        for number, (query, positives, negatives) in enumerate(rows)
    ]
    return write_lines(path, records)


def flagembedding(path):
    """Prompts, also empty ones, types, ids of some; no scores."""
    rows = [("find: ", "normal", "sort", ["a", "b"], ["c", "e"]), ("", "symmetric", "open", ["c"], ["a", "d"])]
    rows += [("of: ", "normal", "sort", ["d"], ["c", "e"])]
    names = "prompt", "type", "query", "pos", "neg"
    records = [dict(zip(names, row, strict=True)) for row in rows]
    records[1] |= {"pos_id": ["id-c"], "neg_id": ["id-a", "id-d"], "id": "q-open"}
    records[0] |= {"pos_id": ["id-a", "id-b"], "neg_id": ["id-c", "id-e"]}
    records[2] |= {"pos_id": ["id-d"], "neg_id": ["id-c", "id-e"]}
    return write_lines(path, records)


def pairs(path):
    """Grades; a query whose text is a passage's, too; no ids."""
    rows = [("sort", "a list", 1), ("open", "a file", 0.3), ("sort", "b2", 2), ("a file", "c", 1)]
    return write_lines(path, [dict(zip(("anchor", "positive", "score"), row, strict=True)) for row in rows])


def tuples(path):
    """As many negatives in each record, with a teacher's scores."""
    rows = [("sort", "a list", "b", "c"), ("open", "a file", "c", "a list"), ("dates", "b2", "c", "b")]
    names = "anchor", "positive", "negative_1", "negative_2"
    records = [dict(zip(names, row, strict=True)) | {"scores": [0.5, 0.25, n / 8]} for n, row in enumerate(rows)]
    return write_lines(path, records)


FORM_OF = {name: name for name in FORMS} | {"tuples": "sentence-transformers"}
MAKERS = {"beir": beir, "tevatron": tevatron, "flagembedding": flagembedding, "sentence-transformers": pairs, "tuples": tuples}


def held(data):
    """All that the tables hold, by id: nothing of how they are stored."""
    queries, corpus = data.queries["_id"], data.corpus["_id"]
    found = {
        side: {row.pop("_id"): row for row in ({**row} for row in table)}
        for side, table in (("queries", data.queries), ("corpus", data.corpus))
    }
    for row in found["corpus"].values():  # a title alone is as good as a text alone
        row["title_length"] %= len(row["text"])
    found["qrels"] = {
        split: {
            (queries[int(q)], corpus[int(p)]): (float(score), None if np.isnan(teacher) else float(teacher))
            for q, p, score, teacher in zip(each.query_rows, each.corpus_rows, each.scores, each.teacher, strict=True)
        }
        for split, each in data.qrels.items()
    }
    found["given"] = {}
    for row, query in enumerate(queries if data.given else []):
        at = slice(data.given.indptr[row], data.given.indptr[row + 1])
        for passage, teacher in zip(data.given.ids[at], data.given.scores[at], strict=True):
            found["given"][query, corpus[int(passage)]] = None if np.isnan(teacher) else float(teacher)
    found["own"] = {queries[row]: corpus[int(own)] for row, own in enumerate(data.own_rows) if own >= 0}
    return found


def made(form, root):
    path = MAKERS[form](root / ("beir" if form == "beir" else f"{form}.jsonl"))
    return open_dataset(path, root / "cache")


def converted(data, form, root, suffix="", **how):
    """Write a data set; return what is read back, and what was said."""
    out = root / f"out-{form}{suffix}"
    told = convert_data(data, out, form, **how)
    assert not [path for path in root.iterdir() if path.name.startswith(".")], "nothing is left beside"
    return open_dataset(out, root / "cache"), told


@pytest.fixture(scope="module", params=MAKERS)
def source(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return request.param, made(request.param, root)


def test_a_form_comes_back_from_itself_as_it_was(source, tmp_path):
    form, data = FORM_OF[source[0]], source[1]
    back, told = converted(data, form, tmp_path, "" if form == "beir" else ".jsonl")
    assert held(back) == held(data)
    assert told["lost"] == {} and not any("has no place for" in sentence for sentence in told["said"])


def test_what_a_form_has_no_place_for_is_all_that_is_lost_and_is_counted(source, tmp_path):
    name, data = source
    for form in FORMS:
        back, told = converted(data, form, tmp_path)
        wanted, lost = without(held(data), form)
        assert told["lost"] == lost, (name, form)
        found = held(back)
        if form == "sentence-transformers":  # has no ids
            wanted, found = (by_text(each) for each in (wanted, found))
        assert found == wanted, (name, form)
        assert bool(lost) == any("has no place for" in sentence for sentence in told["said"])


def without(held, form):
    """What is left of all that tables hold in a form, and how much is lost of what."""
    positives = {key: value for judged in held["qrels"].values() for key, value in judged.items() if value[0] > 0}
    num_graded = sum(score != 1 for judged in held["qrels"].values() for score, _ in judged.values() if score > 0)
    has_teacher = None not in [*(teacher for _, teacher in positives.values()), *held["given"].values()]
    lost = dict.fromkeys(["prompts", "types", "titles", "grades", "not_relevant"], 0)
    lost |= dict.fromkeys(["negatives", "scores", "queries", "passages"], 0)

    def drop(rows, column, to):
        count = sum(row[column] != to for row in rows.values())
        for row in rows.values():
            row[column] = to
        return count

    if form == "beir":
        lost["negatives"], lost["types"] = len(held["given"]), drop(held["queries"], "type", None)
        lost["scores"] = len(held["given"]) + len(positives) if has_teacher else 0
        held["given"] = {}
        held["qrels"] = {split: {k: (s, None) for k, (s, _) in judged.items()} for split, judged in held["qrels"].items()}
        return held, {name: count for name, count in lost.items() if count}
    lost["not_relevant"] = sum(len(judged) for judged in held["qrels"].values())
    held["qrels"] = {split: {k: v for k, v in judged.items() if v[0] > 0} for split, judged in held["qrels"].items()}
    lost["not_relevant"] -= sum(len(judged) for judged in held["qrels"].values())
    if form == "flagembedding" or (form == "sentence-transformers" and (has_teacher or held["given"])):
        lost["grades"] = num_graded
        held["qrels"] = {split: {k: (1.0, t) for k, (_, t) in judged.items()} for split, judged in held["qrels"].items()}
    if form != "tevatron":
        lost["titles"] = drop(held["corpus"], "title_length", 0)
    if form != "flagembedding":
        lost["types"] = drop(held["queries"], "type", None)
    if form == "sentence-transformers":
        lost["prompts"] = drop(held["queries"], "prompt", None)
    named = {key for judged in held["qrels"].values() for key in judged}
    for side, place in (("queries", 0), ("corpus", 1)):
        there = {key[place] for key in (named | set(held["given"]) if place else named)}
        lost["passages" if place else "queries"] = len(held[side].keys() - there)
        held[side] = {row_id: row for row_id, row in held[side].items() if row_id in there}
    return held, {name: count for name, count in lost.items() if count}


def by_text(held):
    """The same by texts in the place of ids; queries of one text become one."""
    names = {side: {row_id: row["text"] for row_id, row in held[side].items()} for side in ("queries", "corpus")}
    queries, corpus = names["queries"], names["corpus"]
    return {
        "texts": {side: set(texts.values()) for side, texts in names.items()},
        "qrels": {split: {(queries[q], corpus[p]): v for (q, p), v in each.items()} for split, each in held["qrels"].items()},
        "given": {(queries[q], corpus[p]): v for (q, p), v in held["given"].items()},
    }


@pytest.mark.parametrize("form", RECORDS)
def test_parquet_holds_what_json_lines_hold(form, tmp_path):
    data = made("tevatron" if form == "sentence-transformers" else form, tmp_path)
    one, two = (converted(data, form, tmp_path, suffix)[0] for suffix in (".jsonl", ".parquet"))
    assert held(one) == held(two) and pq.read_table(tmp_path / f"out-{form}.parquet").num_rows > 1


def test_sentence_transformers_records_are_of_one_length_and_a_number_may_be_given(tmp_path):
    texts, counts = [f"text {number}" for number in range(9)], [4, 4, 4, 3, 5, 0, 4]
    records = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": texts[:count]} for i, count in enumerate(counts)]
    data = open_dataset(write_lines(tmp_path / "in.jsonl", records), tmp_path / "cache")
    for number, least, kept in [(None, 4, [0, 1, 2, 4, 6]), (3, 3, [0, 1, 2, 3, 4, 6]), (0, 0, range(7))]:
        out = tmp_path / f"{number}.jsonl"
        told = convert_data(data, out, "sentence-transformers", num_negatives=number)
        records = [json.loads(line) for line in out.read_text().splitlines()]
        expected = [
            {"anchor": f"q{i}", "positive": f"p{i}", **{f"negative_{n + 1}": texts[n] for n in range(least)}} for i in kept
        ]
        assert records == expected
        left_out, cut = 7 - len(kept), sum(counts[i] > least for i in kept)
        assert told["files"]["train"] == {"records": len(kept), "num_negatives": least, "left_out": left_out, "cut": cut}
    with pytest.raises(InputError, match="the split train has no record to write"):
        convert_data(data, tmp_path / "x.jsonl", "sentence-transformers", num_negatives=6)
    assert not list(tmp_path.glob("*x.jsonl"))


def test_flagembedding_never_reads_a_null(tmp_path):
    rows = [("of: ", "symmetric"), (None, None), ("", "normal")]
    records = [{"query": f"q{n}", "pos": ["b"], "neg": ["c"], "prompt": p, "type": t} for n, (p, t) in enumerate(rows)]
    data = open_dataset(write_lines(tmp_path / "in.jsonl", records), tmp_path / "cache")
    told = convert_data(data, tmp_path / "out.jsonl", "flagembedding")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(record["prompt"], record["type"]) for record in written] == [("of: ", "symmetric"), ("", "normal"), ("", "normal")]
    assert told["said"] == [
        "1 queries without a prompt get an empty one: FlagEmbedding reads a null as the word None",
        "the types are normal, symmetric: FlagEmbedding's same_dataset_within_batch wants a file for each",
    ]


def test_a_teacher_of_some_pairs_alone_is_left_out_and_said(tmp_path):
    record = {"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [1.0], "neg_scores": [0.5]}
    data = open_dataset(write_lines(tmp_path / "in.jsonl", [record]), tmp_path / "cache")
    data.qrels["train"] = replace(data.qrels["train"], teacher=np.full(1, np.nan, np.float32))
    told = convert_data(data, tmp_path / "out.jsonl", "flagembedding")
    assert told["lost"] == {"partial_scores": 1} and "neg_scores" not in json.loads((tmp_path / "out.jsonl").read_text())
    assert told["said"] == ["FlagEmbedding has no place for 1 teacher's scores, as other pairs have none"]


def test_one_split_goes_to_one_file_and_more_to_a_folder(tmp_path, capsys):
    path = beir(tmp_path / "in")
    words = ["data", "convert", str(path), str(tmp_path / "one.jsonl"), f"data.cache={tmp_path / 'cache'}", "--form"]
    with pytest.raises(InputError, match=r"is one file, and .* has the splits test, train; give --split one, or OUT a folder"):
        convert_data(open_dataset(path, tmp_path / "cache"), tmp_path / "one.jsonl", "tevatron")
    app([*words, "tevatron", "--split", "test", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {"test": {"records": 2, "num_negatives": 0, "left_out": 0, "cut": 0}}
    app([*words[:3], str(tmp_path / "all"), *words[4:], "flagembedding"], standalone_mode=False)
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["test.jsonl", "train.jsonl"]
    out = capsys.readouterr().out
    assert "test 2, train 2" in out and "FlagEmbedding has no place for 2 titles apart from their texts, 3 grades" in out


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    data = made("tevatron", tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")
    for out, form, sentence in [
        ("full", "beir", "is not empty; give OUT a new folder"),
        ("full", "tevatron", "is not empty; give OUT a new folder"),
        ("tevatron.jsonl", "tevatron", "is there already; give OUT a new file"),
        ("out.csv", "tevatron", r"is no \.jsonl or \.parquet"),
        ("out.jsonl", "beir", "names a file, and beir is a folder"),
        ("tevatron.jsonl/below", "beir", "cannot write .*; choose another place for it"),
    ]:
        with pytest.raises(InputError, match=sentence):
            convert_data(data, tmp_path / out, form)
    with pytest.raises(InputError, match="has no split dev, only train"):
        convert_data(data, tmp_path / "out", "beir", "dev")
    with pytest.raises(InputError, match="--negatives is for records"):
        convert_data(data, tmp_path / "out", "beir", num_negatives=1)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "full", "tevatron.jsonl"}
    monkeypatch.chdir(tmp_path / "full")
    Path("precious").unlink()
    convert_data(data, Path("."), "beir")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"corpus.jsonl", "queries.jsonl", "qrels"}


def test_an_id_that_no_judgement_can_name_is_refused(tmp_path):
    record = {"query_id": "a\tb", "query": "q", "positive_passages": [{"docid": "d", "title": "", "text": "t"}]}
    data = open_dataset(write_lines(tmp_path / "in.jsonl", [record]), tmp_path / "cache")
    with pytest.raises(InputError, match=r"the id 'a\\tb' holds a tab or a line break"):
        convert_data(data, tmp_path / "out", "beir")
    assert not (tmp_path / "out").exists()


def test_absent_documents_stay_absent_in_beirs_form(tmp_path):
    folder = beir(tmp_path / "data")
    with open(folder / "qrels/test.tsv", "a") as file:
        file.write("q3\tnowhere\t2\nq1\tnowhere\t1\nq1\telsewhere\t1\n")
    data = open_dataset(folder, tmp_path / "cache")
    convert_data(data, tmp_path / "out", "beir")
    back = open_dataset(tmp_path / "out", tmp_path / "cache")
    found, wanted = (sorted(zip(*each, strict=True)) for each in (absent_of(back), absent_of(data)))
    assert found == wanted and len(found) == 3
    assert back.evaluated_queries("test").tolist() == data.evaluated_queries("test").tolist()


def absent_of(data):
    return data.qrels["test"].absent_query_rows.tolist(), data.qrels["test"].absent_scores.tolist()
