"""Whoever takes a training step in `negpool bench peers`: the same texts, model, loss and precision for all of them.

A contender encodes pairs of a query and a passage, computes the contrastive loss of all ranks' pairs, and leaves the gradient in
the parameters of its own copy of the model. How it cuts the batch is a setting, and the best one is found by a search.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launch.bench.pairs import Pairs
from trainer.world import World

Setting = Mapping[str, Any]
BY_LENGTH = "by_length"  # a setting of those who cut a batch as it comes: its pairs in the order of their lengths


@dataclass(frozen=True)
class Scene:
    """What all contenders have alike."""

    world: World
    model: str  # folder
    max_tokens: int  # of a text
    precision: str  # fp32, or bf16 by autocast
    is_quick: bool = False  # fewer settings are tried

    def shared(self, module: nn.Module) -> nn.Module:
        """Return a module as ranks train it together: under DDP, without copies that it can do without; alone, as it is."""
        module = module.to(self.world.device)
        if self.world.group is None:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


class Contender(Protocol):
    """A way to take a step."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def model(self) -> nn.Module:
        """The bare model, whose parameters hold the gradient after a step."""

    @property
    def keeps_graphs(self) -> bool:
        """Whether a step holds the graphs of all pairs at once, so that memory grows with the batch."""

    def settings(self, pairs: int) -> Sequence[Setting]:
        """Return what is to be tried for so many pairs of a rank."""

    def prepare(self, pairs: Pairs, setting: Setting) -> Callable[[], object]:
        """Return the step on this rank's pairs, its texts tokenized and ordered. The step is collective."""


def ordered(pairs: Pairs, setting: Setting) -> Pairs:
    """Return the pairs as a setting orders them: the loss is a mean over all of them, so any order gives the same gradient."""
    if not setting.get(BY_LENGTH):
        return pairs
    queries, passages = (table.lengths for table in pairs.tables)
    return pairs.select(np.lexsort((queries, passages)))


def row_settings(name: str, pairs: int, rows: Sequence[int]) -> list[Setting]:
    """Return settings of a contender that cuts a batch by rows: each size by length, and one as the batch comes.

    Of the sizes that would take the whole batch at once, one is enough.
    """
    useful = [size for size in rows if size < pairs] + [size for size in rows if size >= pairs][:1]
    settings: list[Setting] = [{name: size, BY_LENGTH: True} for size in useful]
    return [*settings, {name: useful[0], BY_LENGTH: False}]
