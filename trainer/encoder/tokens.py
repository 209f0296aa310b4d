"""Token ids of many texts: computed once, kept in an Arrow file, and memory-mapped from then on.

A table is found again by a digest of the texts, the tokenizer's content, the prefixes and the maximum lengths, so nothing
is tokenised twice, and nothing of another tokenizer is ever taken. The texts of an opened data set have a digest already,
so finding their table reads none of them.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.data.cache import build_once, cache_folder
from trainer.data.datasets import RetrievalData
from trainer.encoder.model import Traits
from trainer.encoder.token_file import TokenFile, write_token_file
from trainer.encoder.tokenizer import num_prompt_tokens, tokenizer_content
from trainer.encoder.towers import Side

log = logging.getLogger(__name__)

FORMAT = 3  # of the table on disk; another number tokenises again
PARALLEL_FROM = 20_000  # texts; below, starting processes takes longer than tokenising


class TextRule(NamedTuple):
    """How the texts from one row on, up to the next rule's, become tokens."""

    first_row: int
    prefix: str  # before texts that have no prompt of their own
    max_tokens: int  # longer texts are cut there, special tokens included
    include_prompt: bool = True  # whether the prefix's tokens are pooled

    @property
    def decides(self) -> list:
        """The fields that decide the tokens. A rule that pools the whole text is written as in earlier versions, so that their
        tables are found.
        """
        return list(self[:3] if self.include_prompt else self)


@dataclass(frozen=True)
class TokenTable:
    """Token ids of N texts."""

    digest: str  # of texts, tokenizer, prefixes and maximum lengths
    lengths: np.ndarray  # (N,) int64 tokens of each text, special ones included
    num_truncated: int  # texts that were longer than the maximum, in the table as it was made
    pad_id: int
    ids: TokenFile  # of the whole table
    key_of_row: np.ndarray  # (N,) int64
    row_in_file: np.ndarray | None = None  # (N,) int64; None: as they are
    texts: datasets.Dataset | None = None  # of the whole table
    prompt_tokens: np.ndarray | None = None  # (N,) int64 tokens at the start that are not pooled; None: all are

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return 64-bit keys of the rows' token ids, (n,) int64: equal keys, equal tokens."""
        return self.key_of_row[rows]

    def select(self, rows: np.ndarray) -> "TokenTable":
        """Return the table of some rows, in their order; the tokens stay where they are."""
        if len(rows) == len(self.lengths) and (rows == np.arange(len(rows))).all():
            return self
        digest = hashlib.sha256(self.digest.encode() + np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
        lengths, keys, in_file = self.lengths[rows], self.key_of_row[rows], self._in_file(rows)
        prompts = None if self.prompt_tokens is None else self.prompt_tokens[rows]
        return replace(self, digest=digest, lengths=lengths, key_of_row=keys, row_in_file=in_file, prompt_tokens=prompts)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids of some rows one after the other, int32."""
        return self.ids.read(self._in_file(np.asarray(rows)))

    def prompts(self, rows: np.ndarray) -> np.ndarray:
        """Return how many tokens at the start of some rows are not pooled, (n,) int64."""
        return np.zeros(len(rows), np.int64) if self.prompt_tokens is None else self.prompt_tokens[rows]

    def pad(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of some rows, (n, longest) int64, padded on the right.

        And `pooled_mask`, if prompts are left out of the pooling.
        """
        lengths = self.lengths[rows]
        is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.full(is_token.shape, self.pad_id, np.int64)
        ids[is_token] = self.read(rows)
        padded = {"input_ids": ids, "attention_mask": is_token.astype(np.int64)}
        if self.prompt_tokens is not None:
            is_behind = np.arange(ids.shape[1]) >= self.prompt_tokens[rows][:, None]
            padded["pooled_mask"] = (is_token & is_behind).astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in padded.items()}

    def name(self, row: int) -> str:
        """Return what a person calls the text of a row: its id, where it has one."""
        place = int(self._in_file(np.array([row]))[0])
        has_id = self.texts is not None and "_id" in self.texts.column_names
        return f"the text with id {self.texts[place]['_id']!r}" if has_id else f"text {place}"  # type: ignore[index]

    def _in_file(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.row_in_file is None else self.row_in_file[rows]


def tokenize_side(data: RetrievalData, side: str, tokenizer: PreTrainedTokenizerBase, traits: Traits) -> TokenTable:
    """Return the token table of all "queries" or of the whole "corpus", each source by its own prefix and limit; a text's
    own prompt stands in the place of the prefix.

    Made now, or found in the cache without a look at the texts.
    """
    word = "query" if side == "queries" else "passage"
    rules = []
    for source in data.sources:
        names = f"{word}_prefix", f"max_{word}_tokens"
        own = [getattr(source.settings, name) for name in names]
        prefix, limit = [getattr(traits, name) if value is None else value for name, value in zip(names, own, strict=True)]
        rules.append(TextRule(source.first_row(side), prefix, limit, traits.include_prompt))
    texts = data.queries if side == "queries" else data.corpus
    return _table(texts, f"tokens of the {side} of {data.path}", data.content[side], tokenizer, rules, data.cache, data.num_proc)


def tokenize_texts(
    texts: datasets.Dataset, side: Side, tokenizer: PreTrainedTokenizerBase, traits: Traits, cache: Path | None = None
) -> TokenTable:
    """Return the token table of any texts, as a model reads those of a side; made now, or found in the cache by content."""
    prefix, limit = getattr(traits, f"{side}_prefix"), getattr(traits, f"max_{side}_tokens")
    options = {"prefix": prefix, "max_tokens": limit, "include_prompt": traits.include_prompt}
    return tokenize(texts, tokenizer, **options, cache=cache)


def tokenize(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    max_tokens: int,
    include_prompt: bool = True,
    cache: Path | None = None,
) -> TokenTable:
    """Return the token table of any texts (columns text and perhaps prompt), made now or found in the cache by content."""
    content = hashlib.sha256()
    for batch in texts.with_format("arrow").iter(1000):
        for name in ("text", *(["prompt"] if "prompt" in batch.column_names else [])):
            keys = [0 if text is None else xxhash.xxh3_64_intdigest(text.encode()) for text in batch.column(name).to_pylist()]
            content.update(np.array(keys, np.uint64).tobytes())
    rules = [TextRule(0, prefix, max_tokens, include_prompt)]
    return _table(texts, "tokens of given texts", content.hexdigest(), tokenizer, rules, cache_folder(cache), None)


def _table(
    texts: datasets.Dataset,
    what: str,
    content: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: list[TextRule],
    cache: Path,
    num_proc: int | None,
) -> TokenTable:
    depends_on = [content, hashlib.sha256(tokenizer_content(tokenizer)).hexdigest(), [rule.decides for rule in rules]]
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    folder = build_once(
        cache / f"tokens-{FORMAT}-{digest[:24]}", what, lambda staging: _build(staging, texts, tokenizer, rules, num_proc)
    )
    lengths, keys = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("lengths", "keys"))
    num_truncated = json.loads((folder / "about.json").read_text())["num_truncated"]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    file, prompts = TokenFile(folder / "tokens.arrow"), None
    if not rules[0].include_prompt:  # of one model, so all rules are alike in this
        prompts = np.load(folder / "prompts.npy", mmap_mode="r", allow_pickle=False)
    return TokenTable(digest, lengths, num_truncated, pad_id, file, keys, texts=texts, prompt_tokens=prompts)


def _build(
    folder: Path, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, rules: list[TextRule], num_proc: int | None
) -> None:
    datasets.disable_progress_bars()  # they would be drawn into ours
    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    kinds = {"length": "int64", "key": "int64", "is_cut": "bool", "num_prompt": "int64"}
    features |= {name: datasets.Value(kind) for name, kind in kinds.items()}
    columns = texts.map(
        _encoder(tokenizer, rules),
        batched=True,
        with_indices=True,
        remove_columns=texts.column_names,
        num_proc=_num_proc(len(texts), num_proc),
        cache_file_name=str(folder / "map.arrow"),
        new_fingerprint="tokens",  # nobody looks by it; otherwise it is made of the pickled tokenizer, which takes a while
        features=datasets.Features(features),
    ).data
    kept = {"lengths": "length", "keys": "key"} | ({} if rules[0].include_prompt else {"prompts": "num_prompt"})
    for name, column in kept.items():
        np.save(folder / f"{name}.npy", columns.column(column).to_numpy(), allow_pickle=False)
    num_truncated = int(np.sum(columns.column("is_cut").to_numpy(zero_copy_only=False)))
    if num_truncated:
        limits = " or ".join(str(limit) for limit in sorted({rule.max_tokens for rule in rules}))
        log.info("%d of %d texts are longer than %s tokens and were cut", num_truncated, len(texts), limits)
    (folder / "about.json").write_text(json.dumps({"num_truncated": num_truncated}))
    write_token_file(columns.table.select(["input_ids"]), folder / "tokens.arrow")
    for leftover in folder.glob("map*.arrow"):
        leftover.unlink()


def _num_proc(num_texts: int, num_proc: int | None) -> int | None:
    """Return how many processes tokenise; None: this one."""
    if num_proc is None:
        num_proc = min(len(os.sched_getaffinity(0)), 16) if num_texts >= PARALLEL_FROM else 1
    return None if num_proc == 1 else min(num_proc, num_texts)


def _encoder(tokenizer: PreTrainedTokenizerBase, rules: list[TextRule]) -> Callable[..., dict[str, Any]]:
    """Return what turns a batch of texts and their rows into columns."""
    first_rows = [rule.first_row for rule in rules]
    count = functools.cache(lambda prompt, max_tokens: num_prompt_tokens(tokenizer, prompt, max_tokens))

    def encode(batch: dict[str, list], rows: list[int]) -> dict[str, Any]:
        # A source's rows stand together, so a batch has one or two rules.
        starts = [0, *(first - rows[0] for first in first_rows if rows[0] < first <= rows[-1]), len(rows)]
        arrays: list[np.ndarray] = []
        is_cut: list[bool] = []
        num_prompt: list[int] = []
        for start, stop in itertools.pairwise(starts):
            if start < stop:
                rule = rules[int(np.searchsorted(first_rows, rows[start], side="right")) - 1]
                prompts = batch["prompt"][start:stop] if "prompt" in batch else [None] * (stop - start)
                before = [rule.prefix if prompt is None else prompt for prompt in prompts]
                whole = [prompt + text for prompt, text in zip(before, batch["text"][start:stop], strict=True)]
                ids, cut = _encode(tokenizer, whole, rule.max_tokens)
                arrays, is_cut = arrays + ids, is_cut + cut
                num_prompt += [0 if rule.include_prompt else count(prompt, rule.max_tokens) for prompt in before]
        keys = [_key(row, skipped) for row, skipped in zip(arrays, num_prompt, strict=True)]
        lengths = [len(row) for row in arrays]
        return {"input_ids": arrays, "length": lengths, "key": keys, "is_cut": is_cut, "num_prompt": num_prompt}

    return encode


def _key(ids: np.ndarray, num_prompt: int) -> int:
    """Return a key of tokens; those that are pooled from another place on are another input."""
    return xxhash.xxh3_64_intdigest(ids.tobytes() + (num_prompt.to_bytes(4, "little") if num_prompt else b"")) - (1 << 63)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> tuple[list[np.ndarray], list[bool]]:
    """Return each text's ids, int32, and whether it was cut."""
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    ids = [np.asarray(row, np.int32) for row in encoded["input_ids"]]
    if encoded.encodings is not None:  # a fast tokenizer keeps what it has cut off
        return ids, [bool(encoding.overflowing) for encoding in encoded.encodings]
    longer = tokenizer(texts, truncation=True, max_length=max_tokens + 1, return_attention_mask=False)["input_ids"]
    return ids, [len(row) > max_tokens for row in longer]
