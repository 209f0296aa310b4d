"""Records as people have them: each convention is read with its right value, or refused in one sentence that names the cure.

The values on the right are written down by hand from what the convention means, or read by pandas.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.data.test_forms import save_dataset, write_array, write_lines, write_parquet
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

Q, P, N, M = "how to sort", "sort a list", "open a file", "a hash"
ONE = {Q: ({P: 1}, {N})}  # one query with a positive and a negative
TWO = {Q: ({P: 1}, {N, M})}
PAIR = {Q: ({P: 1}, set())}


def meaning(data, split="train"):
    """What a data set says: of every query that has a positive, its positives with grades and its negatives, as texts."""
    queries, corpus, qrels = list(data.queries["text"]), list(data.corpus["text"]), data.qrels[split]
    found = {}
    for query, passage, grade in zip(qrels.query_rows, qrels.corpus_rows, qrels.scores, strict=True):
        found.setdefault(queries[query], ({}, set()))[0][corpus[passage]] = float(grade)
    for query in range(len(queries)) if data.given else ():
        ids = data.given.ids[data.given.indptr[query] : data.given.indptr[query + 1]]
        if queries[query] in found:
            found[queries[query]][1].update(corpus[row] for row in ids)
    return found


def passage(text, **others):
    return {"docid": f"d-{text}", "title": "", "text": text, **others}


# Records, data.columns, what they mean; a convention a line.
READ = {
    "anchor, positive, negative": ([{"anchor": Q, "positive": P, "negative": N}], {}, ONE),
    "query, positive": ([{"query": Q, "positive": P}], {}, PAIR),
    "query, positive, negative": ([{"query": Q, "positive": P, "negative": N}], {}, ONE),
    "question, answer": ([{"question": Q, "answer": P}], {}, PAIR),
    "question, context": ([{"question": Q, "context": P}], {}, PAIR),
    "query, passage": ([{"query": Q, "passage": P}], {}, PAIR),
    "query, document": ([{"query": Q, "document": P}], {}, PAIR),
    "query, text": ([{"query": Q, "text": P}], {}, PAIR),
    "query, title, text": ([{"query": Q, "title": "Lists", "text": P}], {}, {Q: ({f"Lists {P}": 1}, set())}),
    "title of what is mapped": (
        [{"q": Q, "heading": "Lists", "body": P}, {"q": Q, "heading": None, "body": M}],
        {"query": "q", "positive": "body", "title": "heading"},
        {Q: ({f"Lists {P}": 1, M: 1}, set())},
    ),
    "title of an object": (
        [{"query": Q, "positives": [passage(P, title="Lists")]}],
        {},
        {Q: ({f"Lists {P}": 1}, set())},
    ),
    "title of a question": ([{"question": Q, "answer": P, "title": "Lists"}], {}, PAIR),
    "sentence1, sentence2": ([{"sentence1": Q, "sentence2": P}], {}, PAIR),
    "text1, text2": ([{"text1": Q, "text2": P}], {}, PAIR),
    "negatives in a list": ([{"anchor": Q, "positive": P, "negatives": [N, M]}], {}, TWO),
    "negative as a list": ([{"anchor": Q, "positive": P, "negative": [N, M]}], {}, TWO),
    "positives in a list": ([{"query": Q, "positives": [P, M], "negatives": [N]}], {}, {Q: ({P: 1, M: 1}, {N})}),
    "pos, neg as texts": ([{"query": Q, "pos": P, "neg": N}], {}, ONE),
    "pos, neg as lists": ([{"query": Q, "pos": [P], "neg": [N, M]}], {}, TWO),
    "passages as texts": ([{"query": Q, "positive_passages": [P], "negative_passages": [N]}], {}, ONE),
    "passages with text alone": (
        [{"query": Q, "positive_passages": [{"text": P}], "negative_passages": [{"text": N}]}],
        {},
        ONE,
    ),
    "passages with title": (
        [{"query_id": 7, "query": Q, "positive_passages": [passage(P, title="Lists")], "negative_passages": []}],
        {},
        {Q: ({f"Lists {P}": 1}, set())},
    ),
    "numbers as ids": (
        [{"query_id": 7, "query": Q, "positive_passages": [passage(P, docid=1)], "negative_passages": [passage(N, docid=2.0)]}],
        {},
        ONE,
    ),
    "objects in a list": ([{"query": Q, "positives": [passage(P)], "negatives": [passage(N)]}], {}, ONE),
    "a label in a passage": (
        [{"query": Q, "positive_passages": [passage(P, label=2), passage(M, label=0)], "negative_passages": [passage(N)]}],
        {},
        {Q: ({P: 2}, {N, M})},
    ),
    "label 0 or 1": (
        [{"query": Q, "passage": P, "label": 1}, {"query": Q, "passage": N, "label": 0}],
        {},
        ONE,
    ),
    "labels as words": ([{"query": Q, "text": P, "label": True}, {"query": Q, "text": N, "label": False}], {}, ONE),
    "label beside a positive": ([{"anchor": Q, "positive": t, "label": n} for t, n in ((P, 1), (N, 0))], {}, ONE),
    "labels of equals": ([{"sentence1": Q, "sentence2": t, "label": n} for t, n in ((P, 1.0), (N, 0.0))], {}, ONE),
    "graded labels": (
        [{"query": Q, "document": t, "label": n} for t, n in ((P, 3), (M, 1), (N, 0), ("a tree", -1))],
        {},
        {Q: ({P: 3, M: 1}, {N, "a tree"})},
    ),
    "labels in a list": ([{"query": Q, "docs": [N, P, M], "labels": [0, 2, 0]}], {}, {Q: ({P: 2}, {N, M})}),
    "labels of pos": ([{"query": Q, "pos": [P, M, N], "label": [2, 1, 0]}], {}, {Q: ({P: 2, M: 1}, {N})}),
    "score as a grade": ([{"anchor": Q, "positive": t, "score": n} for t, n in ((P, 0.5), (N, 0.0))], {}, {Q: ({P: 0.5}, {N})}),
    "grades beside negatives": (
        [{"anchor": Q, "positive": t, "negative_1": M, "score": n} for t, n in ((P, 2.0), (N, 0))],
        {},
        {Q: ({P: 2}, {N, M})},
    ),
    "a teacher's scores under another name": (
        [{"query": Q, "positive": P, "negative": N, "score": [3.2, 1.0]}],
        {"scores": "score"},
        ONE,
    ),
    "a likeness taken for a grade": (
        [{"sentence1": Q, "sentence2": t, "score": n} for t, n in ((P, 0.75), (N, 0))],
        {"label": "score"},
        {Q: ({P: 0.75}, {N})},
    ),
    "mapped pair": ([{"title": Q, "abstract": P}], {"query": "title", "positive": "abstract"}, PAIR),
    "anchor means query": ([{"title": Q, "abstract": P}], {"anchor": "title", "positive": "abstract"}, PAIR),
    "mapped negatives": ([{"anchor": Q, "positive": P, "hard_negatives": [N, M]}], {"negative": "hard_negatives"}, TWO),
    "two mapped negatives": (
        [{"anchor": Q, "positive": P, "hn_a": N, "hn_b": M}],
        {"negative_1": "hn_a", "negative_2": "hn_b"},
        TWO,
    ),
    "mapped beside FlagEmbedding": ([{"question": Q, "pos": [P], "neg": [N]}], {"query": "question"}, ONE),
    "mapped beside Tevatron": (
        [{"question": Q, "positive_passages": [passage(P)], "negative_passages": [passage(N)]}],
        {"query": "question"},
        ONE,
    ),
    "DPR, mapped": (
        [{"question": Q, "answers": ["x"], "positive_ctxs": [{"title": "", "text": P}], "hard_negative_ctxs": [{"text": N}]}],
        {"query": "question", "positive": "positive_ctxs", "negative": "hard_negative_ctxs"},
        ONE,
    ),
    "one of two passages": ([{"question": Q, "answer": P, "context": N}], {"positive": "answer"}, PAIR),
    "negatives left out": ([{"anchor": Q, "positive": P, "hard_negative": N}], {"negative": ""}, PAIR),
    "labels left out": ([{"query": Q, "passage": P, "relevance_score": 0.3}], {"label": ""}, PAIR),
    "fewer negatives in some": (
        [{"anchor": Q, "positive": P, "negative_1": N, "negative_2": M}, {"anchor": "x", "positive": "y"}],
        {},
        TWO | {"x": ({"y": 1}, set())},
    ),
    "no scores": (
        [{"query": Q, "pos": [P], "neg": [N], "pos_scores": [], "neg_scores": [], "id": 1, "query_id": "x"}],
        {},
        ONE,
    ),
    "null for no negative": ([{"anchor": Q, "positive": P, "negative_1": N, "negative_2": None}], {}, ONE),
}


@pytest.mark.parametrize("name", READ)
def test_a_convention_is_read_with_its_meaning(tmp_path, name):
    records, columns, expected = READ[name]
    data = open_dataset(write_lines(tmp_path / "a.jsonl", records), tmp_path / "cache", columns)
    assert meaning(data) == expected


# Parquet has one type a column, so what mixes them is left to JSON.
@pytest.mark.parametrize("name", [name for name in READ if name not in ("numbers as ids",)])
def test_a_convention_means_the_same_in_parquet(tmp_path, name):
    records, columns, expected = READ[name]
    data = open_dataset(write_parquet(tmp_path / "a.parquet", records), tmp_path / "cache", columns)
    assert meaning(data) == expected


REFUSED = {
    "hard_negative": (
        {"hard_negative": N},
        r'column hard_negative, .* looks like a negative: .*\{negative = "hard_negative"\} to r',
    ),
    "hardNegatives": ({"hardNegatives": [N]}, r"column hardNegatives, .* looks like a negative"),
    "neg": ({"neg": [N]}, r"column neg, .* looks like a negative"),
    "negative passages": ({"negative_passages": [{"text": N}]}, r"column negative_passages, .* looks like a negative"),
    "ids of negatives": ({"negative_ids": ["7"]}, r"column negative_ids, .* looks like a negative"),
    "second positive": ({"positive_2": M}, r"column positive_2, .* looks like a positive"),
    "instruction": (
        {"instruction": "Find: "},
        r'column instruction, .* looks like a prompt: .*\{prompt = "instruction"\} to read',
    ),
    "passage prompt": ({"passage_prompt": "Text: "}, r"column passage_prompt, .* looks like a prompt"),
    "gold_label": ({"gold_label": 0}, r"column gold_label, .* looks like a label: .*\{label = \"\"\} to leave it out"),
    "is_duplicate": ({"is_duplicate": 0}, r"column is_duplicate, .* looks like a label"),
    "relevance": ({"relevance": 0}, r"column relevance, .* looks like a label"),
    "pos_score": ({"pos_score": 0.5}, r"column pos_score, .* looks like a label"),
    "lable": ({"lable": 0}, r"column lable, .* looks like a label"),
    "second query": ({"anchor_2": Q}, r"column anchor_2, .* looks like a query"),
    "margin": ({"negative": N, "label": 3.5}, r"label holds 3\.5; expected whole numbers, for .* a margin is no grade"),
    "margin called score": ({"negative": N, "score": 3.5}, r"score holds 3\.5; expected whole numbers"),
    "class": ({"label": "entailment"}, r"label holds 'entailment'; expected a finite number"),
    "broken label": ({"label": 0.3}, r'label holds 0\.3; expected whole numbers, .*\{label = "label"\} to take all above 0'),
    "label and score": (
        {"label": 1, "score": 0.5},
        r'found label and score, and each may be the label: say .*\{label = "label"\}',
    ),
    "list as text": (
        {"negative": "['a', 'b']"},
        r"negative holds a list written out as text; save the data as JSON lines or Parq",
    ),
    "list of scores": ({"score": [1, 2]}, r'score is 2 long; expected 1 numbers, .*\{scores = "score"\}'),
    "two queries": ({"query": Q}, r"found anchor and query, and each may be the query: say which by data\.columns"),
    "prompt in a list": ({"prompt": ["x"]}, r"prompt is \['x'\]; expected a string"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_changes_the_meaning_is_read_or_refused_by_name(tmp_path, name):
    others, sentence = REFUSED[name]
    path = write_lines(tmp_path / "a.jsonl", [{"anchor": Q, "positive": P} | others])
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(path, tmp_path / "cache")
    assert "a.jsonl:1: " in str(error.value) and "\n" not in str(error.value)
    assert any(str(error.value) == str(problem) for problem in check_dataset(path).problems)


WHOLE_REFUSED = {
    "likeness of equals": (
        {"sentence1": Q, "sentence2": P, "score": 0.76},
        r"score holds 0\.76; expected 0 and 1 in a pair of eq",
    ),
    "classes of equals": ({"sentence1": Q, "sentence2": P, "label": 2}, r"label holds 2; expected 0 and 1 in a pair of equals"),
    "a teacher's score": ({"query": Q, "passage": P, "score": 7.25}, r'score holds 7\.25; expected whole .*\{label = "score"\}'),
    "candidates": ({"query": Q, "passages": [P, N]}, r"passages is a list without labels; set data\.columns = \{positive"),
    "answer and context": ({"question": Q, "answer": P, "context": N}, r"found answer and context, and each may be the positive"),
    "three equals": ({"text1": Q, "text2": P, "text3": N}, r"column text3, .* looks like a (query|positive)"),
    "instructions in the query": (
        {"query": ["Find: ", Q], "pos": [["Text: ", P]]},
        r"query is \['Find: ', .*\]; expected a string",
    ),
    "negatives beside pos": (
        {"query": Q, "pos": [P], "hard_neg": [N]},
        r'hard_neg, .* looks like a neg.*\{negative = "hard_neg"\}',
    ),
    "a label of a negative": (
        {"query": Q, "positive_passages": [passage(P)], "negative_passages": [passage(N, label=1)]},
        r"negative_passages has a passage with the label 1; move it",
    ),
    "lists of two lengths": (
        {"query": Q, "positive_passages": {"docid": ["1"], "text": [P, N]}},
        r"positive_passages has lists of different lengths",
    ),
    "ids of other length": ({"query": Q, "pos": [P], "pos_id": ["1", "2"]}, r"pos_id is 2 long; expected an id for each of 1"),
    "no passage": (
        {"query": Q, "url": "x"},
        r"found the columns query, url; positive is missing; .* --columns positive=url, or data\.columns = {positive = \"url\"}",
    ),
    "a page": (
        {"title": Q, "body": P},
        r"--columns query=title,positive=body, or data\.columns = {query = \"title\", positive = \"body\"}",
    ),
    "no names": ({Q * 9: P, P * 9: N}, r"--columns query=0,positive=1, or"),
}


@pytest.mark.parametrize("name", WHOLE_REFUSED)
def test_records_that_may_mean_several_things_are_refused(tmp_path, name):
    record, sentence = WHOLE_REFUSED[name]
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*" + sentence) as error:
        open_dataset(write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "cache")
    assert "\n" not in str(error.value)


MAPPINGS = {
    "unknown name": ({"qery": "title"}, r"data\.columns names 'qery', which is none of query, positive, .*did you mean query\?"),
    "two to one": ({"query": "title", "positive": "title"}, r"reads the column 'title' as query and positive; give it one"),
    "one by two names": (
        {"query": "title", "anchor": "abstract"},
        r"data\.columns names the query twice, as query and anchor; leave",
    ),
    "absent": (
        {"query": "titel", "positive": "abstract"},
        r'\{query = "titel"\} names .* not there; did you mean it by \'title\'\?',
    ),
    "absent negatives": (
        {"query": "title", "positive": "abstract", "negative": "hard"},
        r"data\.columns names 'hard', and no record has that; found abstract, title",
    ),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_that_cannot_be_meant_is_one_sentence(tmp_path, name):
    columns, sentence = MAPPINGS[name]
    path = write_lines(tmp_path / "a.jsonl", [{"title": Q, "abstract": P}])
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(path, tmp_path / "cache", columns)
    assert "\n" not in str(error.value)


def blemishes(path, columns=None):
    problems = check_dataset(path, columns or {}).problems
    assert all(problem.is_blemish for problem in problems), problems
    return [(problem.kind, problem.number) for problem in problems]


BLEMISHED = {
    "empty negative": ([{"anchor": Q, "positive": P, "negatives": [N, "", None, " "]}], ONE, [("empty text", 1)] * 3),
    "empty negative with scores": (
        [{"anchor": Q, "positive": P, "negatives": ["", N], "scores": [3, 2, 1]}],
        ONE,
        [("empty text", 1)],
    ),
    "empty positive": ([{"anchor": Q, "positive": P}, {"anchor": "x", "positive": ""}], PAIR, [("empty text", 2)]),
    "one of two positives empty": ([{"query": Q, "pos": [P, ""], "neg": [N]}], ONE, [("empty text", 1)]),
    "null query": ([{"anchor": None, "positive": M}, {"anchor": Q, "positive": P}], PAIR, [("empty text", 1)]),
    "no positive": ([{"query": Q, "pos": [P]}, {"query": "x", "pos": []}], PAIR, [("no positive", 2)]),
    "no positive passage": (
        [{"query": "x", "positive_passages": []}, {"query": Q, "positive_passages": [passage(P)]}],
        PAIR,
        [("no positive", 1)],
    ),
    "only label 0": (
        [{"query": q, "passage": p, "label": n} for q, p, n in ((Q, P, 1), ("x", M, 0), ("x", P, 0), (Q, N, 0))],
        ONE,
        [("no positive", 2)],
    ),
    "columns that mean nothing": (
        [{"anchor": Q, "positive": P, "url": "a", "lang": "en"}, {"anchor": Q, "positive": P, "negative": N, "year": 3}],
        ONE,
        [("column not used", 1)],
    ),
    "fields that mean nothing": (
        [{"query": Q, "positive_passages": [passage(P, url="a")], "answers": ["b"]}],
        PAIR,
        [("column not used", 1)],
    ),
}


@pytest.mark.parametrize("name", BLEMISHED)
def test_a_blemish_is_left_out_counted_and_refused_where_asked(tmp_path, name):
    records, expected, found = BLEMISHED[name]
    path = write_lines(tmp_path / "a.jsonl", records)
    assert meaning(open_dataset(path, tmp_path / "cache")) == expected
    assert blemishes(path) == found
    with pytest.raises(InputError, match=rf"a\.jsonl:{found[0][1]}: .*data\.strict=true refuses"):
        open_dataset(path, tmp_path / "cache", strict=True)


def test_every_column_that_is_not_used_is_named_at_the_start(tmp_path, caplog):
    records = [{"anchor": Q, "positive": P, "url": "a"}, {"anchor": Q, "positive": P, "lang": "en"}]
    with caplog.at_level("INFO"):
        open_dataset(write_lines(tmp_path / "a.jsonl", records), tmp_path / "cache")
    assert caplog.text.count("not used: url, lang;") == 1


def test_files_without_any_positive_are_refused(tmp_path):
    for records in ([{"query": Q, "passage": P, "label": 0}], [{"query": Q, "passage": " "}], [{"query": Q, "pos": []}]):
        path = write_lines(tmp_path / "a.jsonl", records)
        with pytest.raises(InputError, match=r"a\.jsonl: no record here has a query with a positive"):
            open_dataset(path, tmp_path / "cache")


def test_scores_stay_beside_their_passages_when_an_empty_one_goes(tmp_path):
    record = {"anchor": Q, "positive": P, "negatives": ["", N], "scores": [3, 2, 1]}
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "cache")
    assert data.qrels["train"].teacher.tolist() == [3] and data.given.scores.tolist() == [1]


def test_ids_of_flagembedding_and_pairs_are_kept(tmp_path):
    record = {"query": Q, "pos": [P], "neg": [N], "pos_id": ["p"], "neg_id": [4], "id": 12}
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "cache")
    assert data.queries["_id"] == ["12"] and data.corpus["_id"] == ["p", "4"]
    data = open_dataset(write_lines(tmp_path / "b.jsonl", [{"qid": 3, "query": Q, "positive": P}]), columns={"query_id": "qid"})
    assert data.queries["_id"] == ["3"]


def test_running_numbers_of_two_files_can_be_left_out(tmp_path):
    for name, text in (("train", Q), ("dev", "x")):
        write_lines(tmp_path / f"{name}.jsonl", [{"query_id": 0, "query": text, "positive": P}])
    with pytest.raises(InputError, match=r'id \'0\' has another text than at .*set data\.columns = \{query_id = ""\} to leave'):
        open_dataset(tmp_path, tmp_path / "cache")
    assert meaning(open_dataset(tmp_path, tmp_path / "cache", {"query_id": ""}), "dev") == {"x": ({P: 1}, set())}


def test_a_title_is_told_from_its_text(tmp_path):
    record = {"query": Q, "positive_passages": [passage(P, title="Lists "), passage(N), passage("", title="Alone")]}
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "cache")
    assert data.corpus["text"] == [f"Lists {P}", N, "Alone"] and data.corpus["title_length"] == [5, 0, 0]


def test_columns_of_any_arrow_type_are_read(tmp_path):
    texts = pa.array([P, P], pa.large_string())
    passages = pa.array(
        [[{"docid": 5, "text": N}]] * 2, pa.large_list(pa.struct([("docid", pa.uint8()), ("text", pa.large_string())]))
    )
    table = pa.table(
        {
            "query": pa.array([Q, "x"]).dictionary_encode(),
            "positive": texts,
            "negatives": passages,
            "query_id": pa.array([1, 2], pa.int8()),
            "label": pa.array([1, 1], pa.float16()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    data = open_dataset(tmp_path / "a.parquet", tmp_path / "cache", {"label": "label"})
    assert meaning(data) == {Q: ({P: 1}, {N}), "x": ({P: 1}, {N})}
    assert data.queries["_id"] == ["1", "2"] and set(data.corpus["_id"]) >= {"5"}


def write_arrow_file(path, records):
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


KINDS = {write_array: "a.json", write_parquet: "a.parquet", save_dataset: "saved", write_arrow_file: "a.arrow"}


@pytest.mark.parametrize("write", KINDS)
def test_labels_and_lists_are_read_from_every_kind_of_file(tmp_path, write):
    path = tmp_path / KINDS[write]
    records = [{"query": Q, "docs": [P, N], "labels": [1, 0]}, {"query": "x", "docs": [M], "labels": [1]}]
    assert meaning(open_dataset(write(path, records), tmp_path / "cache")) == ONE | {"x": ({M: 1}, set())}
