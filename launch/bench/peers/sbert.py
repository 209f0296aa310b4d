"""sentence-transformers' losses on its own model, as its own trainer runs them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from launch.bench.pairs import Pairs
from launch.bench.peer import Peer
from launch.bench.peers.contender import BY_LENGTH, Scene, Setting, ordered, row_settings

ROWS = {"cpu": (16, 32, 64), "cuda": (128, 512, 1024)}
TOKENS = {"cpu": (2048, 4096, 8192), "cuda": (32768, 65536)}


class SbertStep:
    """A step with one of the losses, the model shared with the other ones."""

    def __init__(self, scene: Scene, peer: Peer, name: str, loss_class: Any, settings: Callable[[int], Sequence[Setting]]):
        self.name = f"sentence-transformers, {name}"
        self.scene, self.peer, self.loss_class, self.settings = scene, peer, loss_class, settings
        self.keeps_graphs = not loss_class.__name__.startswith("Cached")

    @property
    def model(self) -> nn.Module:
        return self.peer.model

    def prepare(self, pairs: Pairs, setting: Setting) -> Callable[[], object]:
        features = self.peer.features_of(ordered(pairs, setting).texts)
        given = {name: value for name, value in setting.items() if name != BY_LENGTH}
        return functools.partial(self.peer.take, features, self.loss_class, **given)


def sbert_steps(scene: Scene) -> list[SbertStep]:
    """Return steps with the cached loss, cut by rows and by tokens, and with the plain one; raises ImportError."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Cached
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Plain

    peer = Peer(scene.world, scene.model, None, scene.max_tokens, scene.precision)
    rows, tokens = (sizes[scene.world.device.type] for sizes in (ROWS, TOKENS))
    if scene.is_quick:
        rows, tokens = rows[:2], tokens[:2]
    by_rows = functools.partial(row_settings, "mini_batch_size", rows=rows)
    by_tokens: list[Setting] = [{"mini_batch_num_tokens": size, BY_LENGTH: True} for size in tokens]
    by_tokens.append({"mini_batch_num_tokens": tokens[0], BY_LENGTH: False})
    return [
        SbertStep(scene, peer, "cached by rows", Cached, by_rows),
        SbertStep(scene, peer, "cached by tokens", Cached, lambda pairs: by_tokens),
        SbertStep(scene, peer, "plain", Plain, lambda pairs: [{BY_LENGTH: False}]),
    ]
