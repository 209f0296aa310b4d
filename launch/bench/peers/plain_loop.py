"""A training step as a person writes it in plain torch: all pairs in one graph, DDP, and a loss of their own or of a package."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launch.bench.job_path import load
from launch.bench.pairs import Pairs
from launch.bench.peers.contender import BY_LENGTH, Scene, Setting, ordered
from launch.bench.peers.pair_losses import PairLoss
from trainer.encoder.encode import DTYPES
from trainer.encoder.tokens import TokenTable

ROWS = {"cpu": (16, 32), "cuda": (512,)}


class PlainEncoder(nn.Module):
    """The model of everybody as a module that takes padded tokens, as torch's own wrappers and GradCache call it."""

    def __init__(self, scene: Scene):
        super().__init__()
        self.encoder, _ = load(scene.model, scene.max_tokens)
        self.dtype = DTYPES[scene.precision]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embeddings of padded texts, (n, D) float32."""
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.encoder({"input_ids": input_ids, "attention_mask": attention_mask}).float()


class PlainModel:
    """A copy of the model under DDP, for all plain loops."""

    def __init__(self, scene: Scene):
        self.scene, self.bare = scene, PlainEncoder(scene)
        self.called = scene.shared(self.bare)


class PlainLoop:
    """One graph of all pairs, encoded in one call for each side or in several."""

    keeps_graphs = True

    def __init__(self, opened: PlainModel, name: str, loss: PairLoss):
        self.opened, self.name, self.loss = opened, name, loss

    @property
    def model(self) -> nn.Module:
        return self.opened.bare

    def settings(self, pairs: int) -> Sequence[Setting]:
        device = self.opened.scene.world.device.type
        parts: list[Setting] = [{"rows": rows, BY_LENGTH: True} for rows in ROWS[device] if rows < pairs]
        return [{"rows": "all", BY_LENGTH: False}, *parts]

    def prepare(self, pairs: Pairs, setting: Setting) -> Callable[[], object]:
        device = self.opened.scene.world.device
        rows = len(pairs) if setting["rows"] == "all" else setting["rows"]
        parts = [padded_parts(table, rows, device) for table in ordered(pairs, setting).tables]
        return functools.partial(self._step, *parts)

    def _step(self, queries: list[dict[str, Any]], passages: list[dict[str, Any]]) -> None:
        query_BD, passage_BD = (torch.cat([self.opened.called(**part) for part in side]) for side in (queries, passages))
        self.loss(query_BD, passage_BD).backward()


def padded_parts(table: TokenTable, rows: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a side's texts as padded tokens, so many rows in each part."""
    firsts = range(0, len(table.lengths), rows)
    parts = (table.pad(np.arange(first, min(first + rows, len(table.lengths)))) for first in firsts)
    return [{name: part[name].to(device) for name in ("input_ids", "attention_mask")} for part in parts]
