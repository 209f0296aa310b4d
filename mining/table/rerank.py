"""A cross-encoder's scores of (query, passage) pairs: they filter candidates, and are published with the negatives.

Scores are logits, before any sigmoid: of one label, or of the second of two over the first. Pairs are scored in blocks of
neighbouring queries, sorted by length within a block; a block is one rank's, so no bit depends on the number of ranks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mining.find.search import SHARE_ROWS
from mining.settings import RerankSettings
from mining.table.filters import Kept
from trainer.data.datasets import RetrievalData
from trainer.encoder.backbone import max_positions
from trainer.encoder.model import hash_tensors
from trainer.encoder.source import cannot_load, resolve_model
from trainer.encoder.tokenizer import load_tokenizer
from trainer.errors import InputError
from trainer.handoff.margins import ceiling

BATCH_TOKENS = 4096  # padded tokens in one forward, on a CPU core or a GPU


@dataclass
class Reranker:
    """A cross-encoder at work on one data set."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    data: RetrievalData
    query_rows: np.ndarray  # (Q,) int64 rows of queries.jsonl

    @cached_property
    def digest(self) -> str:
        """The SHA-256 over the cross-encoder's weights: a folder keeps its name when they change."""
        digest = hashlib.sha256()
        hash_tensors(digest, sorted(self.model.state_dict().items()))
        return digest.hexdigest()

    def score(
        self, query_places: np.ndarray, passage_rows: np.ndarray, on_block: Callable[[float], None] = lambda _: None
    ) -> np.ndarray:
        """Return the score of each pair, (n,) float32; raises InputError for one that is not finite.

        query_places: which training query each pair has, ascending; blocks of SHARE_ROWS of them are scored together.
        on_block: called before each block with the share of the pairs that is done.
        """
        scores = np.empty(len(query_places), np.float32)
        blocks = query_places // SHARE_ROWS
        for block in np.unique(blocks):
            at = slice(*np.searchsorted(blocks, [block, block + 1]))
            on_block(at.start / len(blocks))
            scores[at] = self._score_block(query_places[at], passage_rows[at])
        if not np.isfinite(scores).all():
            first = int(np.isfinite(scores).argmin())
            query = self.data.queries[int(self.query_rows[query_places[first]])]["_id"]
            passage = self.data.corpus[int(passage_rows[first])]["_id"]
            found = f"the cross-encoder scores query {query!r} with passage {passage!r} as {scores[first]}"
            raise InputError(f"{found}; set rerank.model to another")
        return scores

    def _score_block(self, query_places: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        texts = [
            self.data.queries.select(self.query_rows[query_places])["text"][:],
            self.data.corpus.select(passage_rows)["text"][:],
        ]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_tokens)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        scores, start = np.empty(len(order), np.float32), 0
        while start < len(order):
            batch = order[start : start + max(1, BATCH_TOKENS // int(lengths[order[start]]))]
            scores[batch] = self._score_batch({name: [values[i] for i in batch] for name, values in encoded.items()})
            start += len(batch)
        return scores

    def _score_batch(self, inputs: dict[str, Any]) -> np.ndarray:
        padded = self.tokenizer.pad(inputs, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**padded).logits.float().cpu().numpy()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def open_reranker(settings: RerankSettings, data: RetrievalData, query_rows: np.ndarray, device: torch.device) -> Reranker | None:
    """Return the cross-encoder of a job, None where it names none; raises InputError for a model that is none."""
    if not settings.model:
        return None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    none = f"rerank.model={settings.model!r} is not a cross-encoder"
    expected = "expected the folder or hub name of an AutoModelForSequenceClassification with one label, or two"
    try:
        source = resolve_model(settings.model)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = load_tokenizer(source)
    except Exception as error:
        told = cannot_load(settings.model, error)
        if not isinstance(told, InputError):
            raise told from error
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"{none} that can be loaded ({reason}); {expected}") from error
    if found["missing_keys"]:
        # transformers would fill them with random numbers, as for an encoder without the layer that scores
        raise InputError(f"{none}: it has no weights for {min(found['missing_keys'])}; {expected}")
    if model.config.num_labels > 2:
        raise InputError(f"{none} that scores: it has {model.config.num_labels} labels; {expected}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    max_tokens = min(settings.max_tokens, tokenizer.model_max_length, max_positions(model))
    return Reranker(model.eval().to(device), tokenizer, max_tokens, data, query_rows)


def drop_by_cross_encoder(settings: RerankSettings, kept: Kept, teacher_QK: Tensor, positive_Q: np.ndarray) -> None:
    """Drop the candidates that a cross-encoder takes for positives. Source: RocketQA, arXiv 2010.08191; AR2, arXiv 2110.03611.

    positive_Q: its score of the positive that decides for each query.
    """
    if settings.max_score != "off":
        kept.narrow("rerank_max_score", teacher_QK < settings.max_score)
    if settings.margin != "off":
        most_Q = torch.from_numpy(ceiling(positive_Q, settings.margin, 0)).to(teacher_QK.device)
        kept.narrow("rerank_margin", teacher_QK < most_Q[:, None])
