"""sentence-transformers' cached loss, as its own trainer runs it."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.encoder.source import resolve_model
from trainer.errors import InputError
from trainer.world import World

TEMPERATURE = 0.05  # of everybody's loss
SETTINGS: list[dict[str, int]] = [
    {"mini_batch_size": 16},
    {"mini_batch_size": 32},
    {"mini_batch_size": 64},
    {"mini_batch_num_tokens": 4096},
    {"mini_batch_num_tokens": 8192},
]


class Peer:
    """sentence-transformers 6: its cached loss on the same weights and texts."""

    def __init__(self, world: World, name: str, texts: tuple[Any, Any], max_tokens: int):
        """texts: this rank's queries and passages."""
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        except ImportError as error:
            raise InputError("the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer") from error
        self.loss_class = CachedMultipleNegativesRankingLoss
        self.world = world
        self.model = SentenceTransformer(resolve_model(name), device=str(world.device))
        self.model.max_seq_length = max_tokens
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # not part of the embedding: DDP would wait for its gradient
        self.called: nn.Module = self.model
        if world.group is not None:
            self.called = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.features = [self.model.preprocess(side) for side in texts]

    def step(self, pairs: int, setting: dict[str, int]) -> None:
        """Take the peer's step on the first pairs."""
        gather = {"gather_across_devices": True} if self.world.group is not None else {}
        loss = self.loss_class(self.model, scale=1 / TEMPERATURE, **{"mini_batch_size": 32, **setting}, **gather)
        loss.model = self.called  # as its own trainer does
        device = self.world.device
        features = [{k: v[:pairs].to(device) for k, v in side.items() if isinstance(v, Tensor)} for side in self.features]
        loss(features, None).backward()
