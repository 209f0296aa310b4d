"""Every form of file is read back by our own reader as what the table held."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, LambdaLoss

from mining.export import FORMS, write_negatives
from mining.show import show_query
from mining.table.judgements import read_judgements
from tests.tiny import write_tiny_cross_encoder, write_tiny_dataset
from trainer.data.datasets import open_dataset
from trainer.data.record_file import refuse_file
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives

TUPLES = ("sentence-transformers", "triplet", "labeled-pair", "labeled-list")


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """A data set and random negatives, none for the first query."""
    folder = tmp_path_factory.mktemp("export")
    data = open_dataset(write_tiny_dataset(folder / "data"), folder / "cache")
    judgements, random = read_judgements(data, "train"), np.random.default_rng(0)
    counts = random.integers(1, 5, judgements.num_queries) * (np.arange(judgements.num_queries) > 0)
    texts = np.array(data.corpus["text"])
    rows = []
    for place, count in enumerate(counts):
        own = judgements.positives(slice(place, place + 1))[1]
        others = np.flatnonzero(~np.isin(texts, texts[own]))
        _, first = np.unique(texts[others], return_index=True)
        rows.append(random.permutation(others[first])[:count])
    ids = np.concatenate(rows)
    scores = random.integers(0, 64, (3, len(ids) + len(judgements.positive_rows))).astype(np.float32) / 64
    positives = slice(len(ids), None)
    teacher = {"teacher_scores": scores[1, : len(ids)], "positive_teacher_scores": scores[1, positives]}
    indptr = np.concatenate([[0], np.cumsum(counts)])
    more = {"positive_scores": scores[2, positives], **teacher, "clusters": np.arange(len(counts)) % 3}
    return data, judgements, Negatives(indptr, ids, scores[0, : len(ids)], 4, {"source": "model", "checkpoint_step": 8}, **more)


def plain(data, judgements, negatives):
    """(query text) -> ({positive text: teacher}, {negative text: teacher}), from the table itself."""
    texts, found = list(data.corpus["text"]), {}
    for place, query in enumerate(judgements.query_rows):
        start, stop = judgements.positive_indptr[place : place + 2]
        teachers = negatives.positive_teacher_scores[start:stop]
        own = {texts[row]: float(s) for row, s in zip(judgements.positive_rows[start:stop], teachers, strict=True)}
        at = slice(negatives.indptr[place], negatives.indptr[place + 1])
        drawn = {texts[i]: float(s) for i, s in zip(negatives.ids[at], negatives.teacher_scores[at], strict=True)}
        key = data.queries[int(query)]["text"]
        assert key not in found
        found[key] = own, drawn
    return found


def what_fits(form, queries):
    """Those with a negative; for sentence-transformers, those with the number that keeps most texts, cut to it."""
    if form != "sentence-transformers":
        return {query: (own, drawn) for query, (own, drawn) in queries.items() if drawn}

    def fitting(least):
        cut = {query: (own, dict(list(drawn.items())[:least])) for query, (own, drawn) in queries.items()}
        return {query: (own, drawn) for query, (own, drawn) in cut.items() if len(drawn) == least}

    return max((fitting(n) for n in range(1, 5)), key=lambda fit: sum(len(own) * (1 + len(drawn)) for own, drawn in fit.values()))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["sentence-transformers", "tevatron", "flagembedding"])
def test_texts_are_read_back_with_negatives_and_teacher_scores(mined, tmp_path, form, suffix):
    data, judgements, negatives = mined
    told = write_negatives(tmp_path / f"train{suffix}", form, *mined)
    back = open_dataset(tmp_path / f"train{suffix}", tmp_path / "cache")
    expected, texts, queries = what_fits(form, plain(*mined)), list(back.corpus["text"]), list(back.queries["text"])
    num_records = sum(len(own) if form == "sentence-transformers" else 1 for own, _ in expected.values())
    num_all = len(judgements.positive_rows) if form == "sentence-transformers" else negatives.num_queries
    assert (told["records"], told["left_out"]) == (num_records, num_all - num_records) and num_records < num_all
    assert f"{num_all - num_records} of {num_all} records have" in told["said"][0]
    assert set(queries) == set(expected) and [p.name for p in tmp_path.glob("*train*")] == [f"train{suffix}"]
    train, given = back.qrels["train"], back.given
    assert given is not None
    for row, text in enumerate(queries):
        at = train.query_rows == row
        own = {texts[i]: s for i, s in zip(train.corpus_rows[at], train.teacher[at], strict=True)}
        drawn_at = slice(given.indptr[row], given.indptr[row + 1])
        drawn = {texts[i]: s for i, s in zip(given.ids[drawn_at], given.scores[drawn_at], strict=True)}
        assert (own, drawn) == expected[text]
    if form == "tevatron":
        ids = dict(zip(data.queries["text"], data.queries["_id"], strict=True))
        assert set(back.queries["_id"]) == {ids[text] for text in expected}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ids_are_those_of_the_table(mined, tmp_path, suffix):
    data, judgements, negatives = mined
    out = tmp_path / f"new/folder/ids{suffix}"
    write_negatives(out, "ids", *mined)
    records = (
        [json.loads(line) for line in out.read_text().splitlines()] if suffix == ".jsonl" else pq.read_table(out).to_pylist()
    )
    ids = data.corpus["_id"][:]
    assert [record["query_id"] for record in records] == data.queries.select(judgements.query_rows)["_id"][:]
    assert [i for record in records for i in record["negative_ids"]] == [ids[row] for row in negatives.ids]
    np.testing.assert_allclose([s for record in records for s in record["negative_scores"]], negatives.scores)
    np.testing.assert_allclose([s for r in records for s in r["positive_teacher_scores"]], negatives.positive_teacher_scores)
    assert records[0]["negative_ids"] == [] and len(records[0]["positive_ids"]) >= 1


def test_without_a_teacher_there_are_no_columns_for_one(mined, tmp_path):
    data, judgements, full = mined
    negatives = Negatives(full.indptr, full.ids, full.scores, 4, {})
    for form in FORMS:
        for suffix in (".jsonl", ".parquet"):
            write_negatives(tmp_path / f"{form}{suffix}", form, data, judgements, negatives)
        assert '_scores"' not in re.sub("(posi|nega)tive_scores", "", (tmp_path / f"{form}.jsonl").read_text())
    columns = pq.read_schema(tmp_path / "sentence-transformers.parquet").names
    assert columns == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sentence_transformers_other_forms_hold_the_same_pairs(mined, tmp_path, suffix):
    """Each pair of a query and a passage, with its label; our reader takes labels and triplets for what they are."""
    queries = plain(*mined)
    pairs = {(query, text, int(text in own)) for query, (own, drawn) in queries.items() for text in (*own, *drawn)}
    of_drawn = {pair for pair in pairs if queries[pair[0]][1]}
    for form in TUPLES[1:]:
        write_negatives(tmp_path / f"{form}{suffix}", form, *mined)
    found = {form: read_lines(tmp_path / f"{form}{suffix}") for form in TUPLES[1:]}
    assert {(r["anchor"], r["passage"], r["label"]) for r in found["labeled-pair"]} == pairs
    assert len(found["labeled-pair"]) == len(pairs)
    lists = [(r["anchor"], *each) for r in found["labeled-list"] for each in zip(r["passages"], r["labels"], strict=True)]
    assert set(lists) == of_drawn and all(sum(r["labels"]) == 1 for r in found["labeled-list"])
    triplets = {(r["anchor"], r["positive"], r["negative"]): r["scores"] for r in found["triplet"]}
    scored = {(q, p, n): [own[p], drawn[n]] for q, (own, drawn) in queries.items() for p in own for n in drawn}
    assert triplets == scored and len(found["triplet"]) == len(scored)
    for form in TUPLES[1:]:
        back = open_dataset(tmp_path / f"{form}{suffix}", tmp_path / "cache")
        texts, asked, train = back.corpus["text"][:], back.queries["text"][:], back.qrels["train"]
        own = {(asked[q], texts[i], 1) for q, i in zip(train.query_rows, train.corpus_rows, strict=True)}
        drawn = {(asked[q], texts[i], 0) for q in range(len(asked)) for i in back.given.ids[slice(*back.given.indptr[q : q + 2])]}
        assert own | drawn == (pairs if form == "labeled-pair" else of_drawn)


def test_scores_that_are_asked_for_are_those_by_which_was_mined(mined, tmp_path):
    data, judgements, negatives = mined
    own = replace(negatives, teacher_scores=None, positive_teacher_scores=None)
    as_teacher = replace(negatives, teacher_scores=negatives.scores, positive_teacher_scores=negatives.positive_scores)
    for form in FORMS:
        for name, version, scores in (("asked", own, True), ("taught", as_teacher, True), ("quiet", own, False)):
            write_negatives(tmp_path / f"{form}-{name}.jsonl", form, data, judgements, version, scores)
        asked, taught, quiet = (read_lines(tmp_path / f"{form}-{name}.jsonl") for name in ("asked", "taught", "quiet"))
        if form == "ids":
            assert asked == quiet and all(len(r["positive_scores"]) == len(r["positive_ids"]) for r in asked)
        else:
            assert asked == taught != quiet, form
    assert read_lines(tmp_path / "labeled-pair-asked.jsonl")[0].keys() == {"anchor", "passage", "score"}
    assert read_lines(tmp_path / "labeled-list-asked.jsonl")[0].keys() == {"anchor", "passages", "scores"}
    of_words = replace(own, positive_scores=None)
    with pytest.raises(InputError, match="BM25 gives a positive no score, so there are none to write; leave out --scores"):
        write_negatives(tmp_path / "words.jsonl", "triplet", data, judgements, of_words, scores=True)


@pytest.mark.parametrize(("form", "loss"), [("labeled-pair", BinaryCrossEntropyLoss), ("labeled-list", LambdaLoss)])
def test_a_cross_encoder_of_sentence_transformers_trains_on_labels(mined, tmp_path, form, loss):
    write_negatives(tmp_path / "train.parquet", form, *mined)
    model = CrossEncoder(str(write_tiny_cross_encoder(tmp_path / "model")), num_labels=1, device="cpu")
    how = CrossEncoderTrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    data = Dataset(pq.read_table(tmp_path / "train.parquet"))
    assert CrossEncoderTrainer(model, how, train_dataset=data, loss=loss(model)).train().training_loss > 0


def read_lines(path):
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else [*map(json.loads, path.read_text().splitlines())]


def test_a_file_that_cannot_be_made_is_refused_and_nothing_is_left(mined, tmp_path):
    with pytest.raises(InputError, match=r"ids\.csv is no \.jsonl or \.parquet"):
        refuse_file(tmp_path / "ids.csv")
    (tmp_path / "ids.jsonl").write_text("precious")
    with pytest.raises(InputError, match="is there already; give --out a new file"):
        refuse_file(tmp_path / "ids.jsonl")
    with pytest.raises(InputError, match=r"cannot write .*; choose another place for it"):
        write_negatives(tmp_path / "ids.jsonl" / "below.jsonl", "ids", *mined)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.jsonl"] and (tmp_path / "ids.jsonl").read_text() == "precious"


def test_a_query_is_shown_with_texts_and_scores_best_first(mined):
    data, judgements, _ = mined
    ids = data.queries.select(judgements.query_rows)["_id"][:]
    for place in (1, 7):
        shown = show_query(*mined, ids[place])
        own, drawn = plain(*mined)[shown["query"]]
        assert {p["text"]: p["teacher_score"] for p in shown["negatives"]} == drawn
        assert {p["text"] for p in shown["positives"]} == set(own) and shown["cluster"] == place % 3
        assert (np.diff([p["score"] for p in shown["negatives"]]) <= 0).all()
        assert (shown["version"], shown["checkpoint_step"], shown["query_id"]) == (4, 8, ids[place])
    assert show_query(*mined, ids[0])["negatives"] == []


def test_an_unknown_query_is_refused_with_near_ids_and_one_of_another_split_with_the_reason(mined):
    data, judgements, _ = mined
    with pytest.raises(
        InputError, match=r"has no query 'q111'; expected the id of a query or its exact text; near to it: q1\d?, "
    ):
        show_query(*mined, "q111")
    other = next(row["_id"] for i, row in enumerate(data.queries) if i not in judgements.query_rows)
    with pytest.raises(InputError, match=f"query '{other}' has no positive in the training split"):
        show_query(*mined, other)
    with pytest.raises(InputError, match=r"or its exact text$"):
        show_query(*mined, "how is a parcel sent back")


def test_a_query_is_found_by_its_text(mined):
    data, judgements, _ = mined
    row = int(judgements.query_rows[7])
    shown = show_query(*mined, f"{data.queries[row]['text']}\n")
    assert shown == show_query(*mined, data.queries[row]["_id"])


@pytest.mark.parametrize("form", ["ids", "sentence-transformers", "tevatron", "flagembedding"])
def test_with_margins_to_each_positive_a_record_has_one_and_what_it_admits(mined, tmp_path, form):
    data, judgements, negatives = mined
    margins = {"relative_margin": 0.2, "absolute_margin": "off", "adaptive_margin": "off", "teacher_margin": 0.1}
    each = replace(negatives, manifest={**negatives.manifest, "margins": {"positive": "each", **margins}})
    told = write_negatives(tmp_path / "train.jsonl", form, data, judgements, each)
    num_records = told["records"] + told["left_out"]
    assert num_records == len(judgements.positive_rows) > judgements.num_queries
    texts = data.corpus["_id" if form == "ids" else "text"][:]
    wanted, dropped = [], 0
    for place in range(judgements.num_queries):
        for at in range(*judgements.positive_indptr[place : place + 2]):
            own = slice(negatives.indptr[place], negatives.indptr[place + 1])
            is_below = negatives.scores[own] < np.float32(0.8) * negatives.positive_scores[at]
            is_below &= negatives.teacher_scores[own] < negatives.positive_teacher_scores[at] - np.float32(0.1)
            wanted.append((texts[judgements.positive_rows[at]], [texts[row] for row in negatives.ids[own][is_below]]))
            dropped += (~is_below).sum()
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    if form != "ids":
        least, most = (len(of_record(form, records[0])[1]),) * 2 if form == "sentence-transformers" else (1, None)
        wanted = [(own, drawn[:most]) for own, drawn in wanted if len(drawn) >= least]
    assert [of_record(form, record) for record in records] == wanted and 0 < dropped < len(negatives.ids)


def of_record(form, record):
    """Return the positive of a record and its negatives."""
    if form == "ids":
        return *record["positive_ids"], record["negative_ids"]
    if form == "sentence-transformers":
        return record["positive"], [record[f"negative_{n}"] for n in range(1, 9) if f"negative_{n}" in record]
    if form == "tevatron":
        return record["positive_passages"][0]["text"], [passage["text"] for passage in record["negative_passages"]]
    return *record["pos"], record["neg"]


def test_prompts_types_titles_and_ids_go_from_the_data_to_every_form(tmp_path):
    records = [
        {
            "query": f"q{n}", "id": f"id {n}", "prompt": f"task {n % 2}: ", "type": "normal",
            "pos": [f"p{n}"], "pos_id": [f"of {n}"], "neg": ["x", "y"],
        }
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = open_dataset(tmp_path / "in.jsonl", tmp_path / "cache")
    judgements = read_judgements(data, "train")
    others = [row for row, text in enumerate(data.corpus["text"]) if text in ("x", "y")]
    mined = Negatives(np.arange(0, 13, 2), np.array(others * 6), np.linspace(0, 1, 12, dtype=np.float32), 1, {})
    told = {}
    for form in FORMS:
        told[form] = write_negatives(tmp_path / f"{form}.jsonl", form, data, judgements, mined)["said"]
        found = [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
        if form == "flagembedding":
            assert [{name: record[name] for name in records[0] if name != "neg"} for record in found] == [
                {name: value for name, value in record.items() if name != "neg"} for record in records
            ]
        elif form == "tevatron":
            assert [(record["query_id"], record["prompt"]) for record in found] == [(r["id"], r["prompt"]) for r in records]
        elif form == "sentence-transformers":
            assert [record["anchor"] for record in found] == [record["query"] for record in records], "not folded into the text"
    assert told == {
        "ids": [],
        **{name: ["sentence-transformers has no place for 6 prompts, 6 types of queries"] for name in TUPLES},
        "tevatron": ["Tevatron has no place for 6 types of queries"],
        "flagembedding": [],
    }
