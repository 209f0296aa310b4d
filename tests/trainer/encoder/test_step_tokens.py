"""The inputs of chunks, made on the device: equal to padding each chunk by itself, and without a question to the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gradcache.chunks import plan_chunks
from tests.host import forbids_host_reads
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.step_tokens import StepTokens
from trainer.encoder.tokens import tokenize

CPU, PAD = torch.device("cpu"), 7


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Queries and passages, once with prompts that are not pooled and once without."""
    root = tmp_path_factory.mktemp("step_tokens")
    data = open_dataset(write_tiny_dataset(root / "data"), root / "cache")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_encoder(root / "encoder"))
    found = {}
    for include_prompt in (True, False):
        options = {"max_tokens": 12, "include_prompt": include_prompt, "cache": root / "cache"}
        both = [
            tokenize(texts, tokenizer, prefix=prefix, **options) for texts, prefix in ((data.queries, ""), (data.corpus, "read "))
        ]
        found[include_prompt] = [replace(table, pad_id=PAD) for table in both]
    return found


def step_of(tables, seed, is_packed=False, device=CPU):
    """Tokens of some rows of both tables, some of them twice, and of each row its table and its row there."""
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, len(table.lengths), size) for table, size in zip(tables, draw.integers(0, 60, 2), strict=True)]
    rows[1] = np.append(rows[1], 0)
    where = [(table, row) for table, chosen in zip(tables, rows, strict=True) for row in chosen]
    return StepTokens(list(zip(tables, rows, strict=True)), device, is_packed), where


def chunks_of(where, max_tokens, is_packed):
    return plan_chunks(torch.tensor([int(table.lengths[row]) for table, row in where]), max_tokens, is_packed)


def padded(where):
    """Some rows of both tables, padded by themselves."""
    each = [table.pad(np.array([row])) for table, row in where]
    longest = max(inputs["input_ids"].shape[1] for inputs in each)
    fill = {"input_ids": PAD, "attention_mask": 0, "pooled_mask": 0}
    return {
        name: torch.cat([torch.nn.functional.pad(i[name], (0, longest - i[name].shape[1]), value=fill[name]) for i in each])
        for name in each[0]
    }


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_padded_inputs_are_those_of_the_tables(tables, seed, include_prompt):
    tokens, where = step_of(tables[include_prompt], seed)
    draw, num_without_mask = np.random.default_rng(seed), 0
    chunks = [*chunks_of(where, 60, False), torch.from_numpy(draw.permutation(len(where))), torch.tensor([len(where) - 1] * 2)]
    for rows in chunks:
        found, wanted = tokens.load(rows), padded([where[row] for row in rows])
        if wanted["attention_mask"].all():
            num_without_mask += 1
            del wanted["attention_mask"]
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert found[name].equal(values) and found[name].dtype == values.dtype, name
    assert num_without_mask


def test_one_tables_rows_come_as_the_table_pads_them(tables):
    table = tables[True][1]
    rows = np.array([5, 3, 5, 40, 0])
    found, wanted = StepTokens([(table, rows)], CPU).load(torch.arange(5)), table.pad(rows)
    assert found["input_ids"].equal(wanted["input_ids"]) and found["attention_mask"].equal(wanted["attention_mask"])


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_packed_inputs_are_the_rows_one_behind_the_other(tables, seed, include_prompt):
    tokens, where = step_of(tables[include_prompt], seed, is_packed=True)
    for rows in [*chunks_of(where, 60, True), torch.randperm(len(where))]:
        found, wanted = tokens.load(rows), padded([where[row] for row in rows])
        is_token = wanted.pop("attention_mask").bool()
        lengths = is_token.sum(1)
        assert found.pop("longest") == lengths.max()
        assert found["starts"].dtype == torch.int32 and found.pop("starts").tolist() == [0, *lengths.cumsum(0).tolist()]
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert found[name].equal(values[is_token]) and found[name].dtype == values.dtype, name


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_rows_are_any_input_also_of_a_rank_that_has_none(tables, is_packed):
    nothing, some = np.zeros(0, np.int64), np.array([4, 2])
    for rows in (nothing, some):
        found = StepTokens([(tables[True][0], nothing), (tables[True][1], rows)], CPU, is_packed).load(torch.tensor([]).long())
        assert found["input_ids"].numel() > 0
        assert not is_packed or len(found["starts"]) == 2


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_text_that_comes_twice_is_read_once(tables, is_packed, monkeypatch):
    read, whole = [], type(tables[True][0]).read
    monkeypatch.setattr(type(tables[True][0]), "read", lambda table, rows: read.append(len(rows)) or whole(table, rows))
    StepTokens([(tables[True][0], np.array([1, 1, 2])), (tables[True][1], np.array([8, 3, 8]))], CPU, is_packed)
    assert read == [2, 2]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_asks_nothing_of_the_device(tables, is_packed, include_prompt, device):
    tokens, where = step_of(tables[include_prompt], 3, is_packed, torch.device(device))
    for rows in chunks_of(where, 60, is_packed):
        with forbids_host_reads():
            inputs = tokens.load(rows)
        assert {values.device.type for values in inputs.values() if isinstance(values, torch.Tensor)} == {device}


@pytest.mark.parametrize(
    "read",
    [lambda t: t.sum().item(), lambda t: t[t > 1], lambda t: bool((t > 0).all()), torch.unique, lambda t: t.repeat_interleave(t)],
)
def test_a_read_of_the_device_is_noticed(read):
    with forbids_host_reads(), pytest.raises(AssertionError, match="waits for the device"):
        read(torch.arange(3))
