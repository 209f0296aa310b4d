"""A prompt of a record stays with its query: in the table, in the tokens, and apart from what masks and mining know."""

import itertools

import numpy as np
import pytest
from transformers import AutoTokenizer

from mining.table.judgements import read_judgements
from tests.tiny import write_tiny_encoder
from tests.trainer.data.test_forms import write_lines
from tests.trainer.data.test_record_conventions import M, N, P, Q, passage
from trainer.data.collate import training_set
from trainer.data.datasets import open_dataset
from trainer.encoder.model import Traits
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError


def test_a_query_with_two_prompts_is_two_queries(tmp_path):
    records = [
        {"query": Q, "pos": [text], "prompt": prompt} for text, prompt in ((P, "A: "), (N, "B: "), (M, "A: "), (M, None), (M, ""))
    ]
    data = open_dataset(write_lines(tmp_path / "a.jsonl", records), tmp_path / "cache")
    assert data.queries["text"] == [Q] * 4 and data.queries["prompt"] == ["A: ", "B: ", None, ""]
    indptr, rows = data.positives(np.arange(4))
    positives = [{data.corpus["text"][row] for row in rows[a:b]} for a, b in itertools.pairwise(indptr)]
    assert positives == [{P, M}, {N}, {M}, {M}]
    assert data.has_prompts == {"queries": True, "corpus": False}


@pytest.mark.parametrize("form", ["pairs", "tevatron", "flagembedding", "mapped"])
def test_a_prompt_is_kept_in_every_form(tmp_path, form):
    sides = {"pairs": {"anchor": Q, "positive": P}, "tevatron": {"query": Q, "positive_passages": [passage(P)]}}
    record = sides.get(form, {"query": Q, "pos": [P], "type": "normal"})
    name, columns = ("instruction", {"prompt": "instruction"}) if form == "mapped" else ("prompt", {})
    data = open_dataset(write_lines(tmp_path / "a.jsonl", [record | {name: "Find: "}]), tmp_path / "cache", columns)
    assert data.queries["text"] == [Q] and data.queries["prompt"] == ["Find: "]
    assert data.queries["type"] == ["normal" if "type" in record else None]


def test_one_id_with_two_prompts_is_refused(tmp_path):
    records = [{"query_id": "1", "query": Q, "positive_passages": [P], "prompt": prompt} for prompt in ("A: ", "B: ")]
    path = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError, match=r"a\.jsonl:2: id '1' has another prompt than at line 1; "):
        open_dataset(path, tmp_path / "cache")
    write_lines(path, records[:1] * 2)
    assert open_dataset(path, tmp_path / "cache").queries["prompt"] == ["A: "]


def test_tokens_are_those_of_prompt_and_text_without_a_prefix(tmp_path):
    """And a model's masks know the queries for one text, in a batch as in mining."""
    prompts = ["parse a ", "open the ", "", None]
    records = [{"query": Q, "pos": [text], "prompt": prompt} for text, prompt in zip((P, N, M, "a tree"), prompts, strict=True)]
    data = open_dataset(write_lines(tmp_path / "a.jsonl", records), tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_encoder(tmp_path / "encoder"))
    limits = {"max_query_tokens": 32, "max_passage_tokens": 64}
    traits = Traits(pooling="mean", normalize=True, query_prefix="find ", passage_prefix="", **limits)
    queries, passages = (tokenize_side(data, side, tokenizer, traits) for side in ("queries", "corpus"))
    for row, whole in enumerate([f"parse a {Q}", f"open the {Q}", Q, f"find {Q}"]):
        assert queries.pad(np.array([row]))["input_ids"][0].tolist() == tokenizer(whole)["input_ids"]
    assert len(set(queries.key_of_row.tolist())) == 4, "four inputs"
    training = training_set(data, "train", queries, passages)
    assert len(set(training.query_keys.tolist())) == 1, "one text"
    judgements = read_judgements(data, "train")
    assert judgements.text_of_query.tolist() == [0] * 4 and judgements.judged_rows.tolist() == [0, 1, 2, 3]
