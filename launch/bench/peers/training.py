"""A short training of everybody from the same weights, with the same batches and the same optimizer, and what it is worth.

Without dropout, so that only gradients differ; AdamW and clipping as a job has them. The measures are those of
`negpool eval`, on a part of the test split.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.bench.peers.contender import Scene
from launch.bench.peers.exact import bare_name
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.settings import EncodeSettings
from trainer.evaluate import evaluate
from trainer.job import OptimSettings

SPLIT = "test"


class ShortTraining:
    """The weights that everybody starts from, and the encoder that trained ones are evaluated in."""

    def __init__(self, scene: Scene, folder: Path):
        """folder: with the part of the test split."""
        self.scene, self.folder = scene, folder
        settings = ModelSettings(name=scene.model, max_query_tokens=scene.max_tokens, max_passage_tokens=scene.max_tokens)
        self.encoder, self.tokenizer, self.traits = load_encoder(settings)
        self.encoder.to(scene.world.device).eval()
        self.start = {name: weight.detach().clone() for name, weight in self._weights(self.encoder).items()}
        self.data = open_dataset(folder / "test-part", folder / "cache")

    def train(self, model: nn.Module, steps: Iterable[Callable[[], object]]) -> dict[str, float]:
        """Return the measures of a model after its steps; its weights and its mode are then as before. Collective."""
        own = {name: weight for name, weight in self._weights(model).items() if weight.requires_grad}
        model.eval()
        settings = OptimSettings()
        optimizer = torch.optim.AdamW(own.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        for step in steps:
            model.zero_grad(set_to_none=True)
            step()
            nn.utils.clip_grad_norm_(own.values(), settings.max_grad_norm)
            optimizer.step()
        self._fill(self._weights(self.encoder), own)
        self._fill(own, self.start)
        model.zero_grad(set_to_none=True)
        model.train()
        return self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """Return the measures of the weights that were filled in last. Collective."""
        if self.scene.world.group is not None:
            for weight in self._weights(self.encoder).values():  # to the bit: ranks share what they encode
                dist.broadcast(weight.detach(), 0, group=self.scene.world.group)
        precision = EncodeSettings(dtype="fp32")
        of = self.data, SPLIT, self.encoder, self.tokenizer, self.traits
        return evaluate(self.scene.world, *of, self.folder / "shards", encode=precision)

    @staticmethod
    def _weights(model: nn.Module) -> dict[str, Tensor]:
        return {bare_name(name): weight for name, weight in model.named_parameters()}

    @staticmethod
    def _fill(weights: dict[str, Tensor], source: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in source.items():
                weights[name].copy_(weight)
