"""Token ids of many texts: computed once, kept in Arrow, memory-mapped ever after.

A table is found again by a digest of the texts, the tokenizer's content, the prefix and the maximum length, so nothing
is tokenised twice, and nothing of another tokenizer is ever taken.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.data.cache import build_once, cache_folder

log = logging.getLogger(__name__)

FORMAT = 1  # of the table on disk; another number tokenises again
PARALLEL_FROM = 20_000  # texts; below, starting processes takes longer than tokenising


@dataclass(frozen=True)
class TokenTable:
    """Token ids of N texts."""

    digest: str  # of texts, tokenizer, prefix and maximum length
    lengths: np.ndarray  # (N,) int64 tokens of each text, special ones included
    num_truncated: int  # texts that were longer than the maximum
    pad_id: int
    ids: datasets.Dataset  # column "input_ids", Arrow format
    key_of_row: np.ndarray  # (N,) int64

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return 64-bit keys of the rows' token ids, (n,) int64: equal keys, equal tokens."""
        return self.key_of_row[rows]

    def pad(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of some rows, (n, longest) int64, padded on the right."""
        lengths = self.lengths[rows]
        is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.full(is_token.shape, self.pad_id, np.int64)
        if len(rows):
            ids[is_token] = _flat(self.ids[np.asarray(rows)])
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(is_token.astype(np.int64))}


def tokenize(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    max_tokens: int,
    cache: Path | None = None,
) -> TokenTable:
    """Return the token table of the column "text", made now or found in the cache.

    max_tokens: longer texts are cut there, special tokens included; how many is logged when the table is made.
    """
    digest = _digest(texts, tokenizer, prefix, max_tokens)
    folder = build_once(
        cache_folder(cache) / f"tokens-{FORMAT}-{digest[:24]}",
        lambda staging: _build(staging, texts, tokenizer, prefix, max_tokens),
    )
    ids = datasets.Dataset.from_file(str(folder / "tokens.arrow")).with_format("arrow")
    lengths, keys = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("lengths", "keys"))
    num_truncated = json.loads((folder / "about.json").read_text())["num_truncated"]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenTable(digest, lengths, num_truncated, pad_id, ids, keys)


def _build(folder: Path, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, prefix: str, max_tokens: int) -> None:
    def encode(batch: dict[str, list]) -> dict[str, list]:
        whole = [prefix + text for text in batch["text"]]
        cut = tokenizer(whole, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
        longer = tokenizer(whole, truncation=True, max_length=max_tokens + 1, return_attention_mask=False)["input_ids"]
        arrays = [np.asarray(row, np.int32) for row in cut]
        return {
            "input_ids": arrays,
            "length": [len(row) for row in arrays],
            "key": [xxhash.xxh3_64_intdigest(row.tobytes()) - (1 << 63) for row in arrays],
            "is_cut": [len(row) > max_tokens for row in longer],
        }

    num_proc = min(os.cpu_count() or 1, 16) if len(texts) >= PARALLEL_FROM else None
    datasets.disable_progress_bars()  # they would be drawn into ours
    table = texts.map(
        encode,
        batched=True,
        remove_columns=texts.column_names,
        num_proc=num_proc,
        cache_file_name=str(folder / "map.arrow") if num_proc is None else None,
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "length": datasets.Value("int64"),
                "key": datasets.Value("int64"),
                "is_cut": datasets.Value("bool"),
            }
        ),
    )
    columns = table.data
    for name, column in (("lengths", "length"), ("keys", "key")):
        np.save(folder / f"{name}.npy", columns.column(column).to_numpy(), allow_pickle=False)
    num_truncated = int(np.sum(columns.column("is_cut").to_numpy(zero_copy_only=False)))
    if num_truncated:
        log.info("%d of %d texts are longer than %d tokens and were cut", num_truncated, len(texts), max_tokens)
    (folder / "about.json").write_text(json.dumps({"num_truncated": num_truncated}))
    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as sink:
        ids = columns.table.select(["input_ids"])
        with pa.ipc.new_stream(sink, ids.schema) as writer:
            writer.write_table(ids)
    for leftover in folder.glob("*map.arrow"):
        leftover.unlink()


def _digest(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, prefix: str, max_tokens: int) -> str:
    content = xxhash.xxh3_128()
    for batch in texts.with_format("arrow").iter(1000):
        content.update(json.dumps(batch.column("text").to_pylist()).encode())
    digest = hashlib.sha256(content.digest())
    digest.update(_tokenizer_content(tokenizer))
    digest.update(json.dumps([prefix, max_tokens]).encode())
    return digest.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return what decides a tokenizer's output: its rules and vocabulary, whatever it is called."""
    if tokenizer.is_fast:
        # The last call's truncation and padding are part of the serialised rules, and none of their content.
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        return json.dumps({**rules, "truncation": None, "padding": None}, sort_keys=True).encode()
    return json.dumps([tokenizer.get_vocab(), repr(tokenizer)], sort_keys=True).encode()


def _flat(table: pa.Table) -> np.ndarray:
    """Return the tokens of all rows of a table one after the other, int32."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in table.column("input_ids").chunks])
