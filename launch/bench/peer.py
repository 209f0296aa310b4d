"""sentence-transformers' cached loss, as its own trainer runs it, with all that ours has: bfloat16, flash attention."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import is_flash_attn_2_available

from launch.bench.turns import try_settings
from trainer.encoder.encode import DTYPES
from trainer.encoder.source import resolve_model
from trainer.errors import InputError
from trainer.world import World

Setting = Mapping[str, int]
NOT_INSTALLED = "the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer"
TEMPERATURE = 0.05  # of everybody's loss
SETTINGS: dict[str, list[Setting]] = {
    "cpu": [
        *({"mini_batch_size": rows} for rows in (16, 32, 64)),
        *({"mini_batch_num_tokens": tokens} for tokens in (4096, 8192)),
    ],
    "cuda": [
        *({"mini_batch_size": rows} for rows in (128, 512, 1024)),
        *({"mini_batch_num_tokens": tokens} for tokens in (32768, 65536)),
    ],
}
TRIAL_PAIRS = {"cpu": 48, "cuda": 2048}  # of the batch, to find the best setting: more than one chunk of the largest


class Peer:
    """sentence-transformers 6: its cached loss on the same weights and texts."""

    def __init__(self, world: World, name: str, texts: tuple[Any, Any] | None, max_tokens: int, precision: str = "fp32"):
        """texts: this rank's queries and passages, in a column text, for `step`. precision: fp32, or bf16 for autocast."""
        try:
            from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        except ImportError as error:
            raise InputError(NOT_INSTALLED) from error
        self.loss_class = CachedMultipleNegativesRankingLoss
        self.world, self.dtype = world, DTYPES[precision]
        self.model = open_peer(resolve_model(name), world.device, self.dtype)
        self.model.max_seq_length = max_tokens
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # not part of the embedding: DDP would wait for its gradient
        self.called: nn.Module = self.model
        if world.group is not None:
            self.called = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.features = self.features_of(texts) if texts is not None else []

    def features_of(self, texts: tuple[Any, Any]) -> list[dict[str, Any]]:
        """Return what the peer's own preprocessing makes of queries and of passages, on the device."""
        sides = (self.model.preprocess(list(side["text"])) for side in texts)
        return [{name: v.to(self.world.device) for name, v in side.items() if isinstance(v, Tensor)} for side in sides]

    def step(self, pairs: int, setting: Setting) -> None:
        """Take the peer's step on the first pairs."""
        features = [{name: v[:pairs] for name, v in side.items()} for side in self.features]
        self.take(features, self.loss_class, **{"mini_batch_size": 32, **setting})

    def take(self, features: list[dict[str, Any]], loss_class: Any, **setting: Any) -> None:
        """Take a step on features of queries and passages with one of the peer's losses. Collective."""
        gather = {"gather_across_devices": True} if self.world.group is not None else {}
        loss = loss_class(self.model, scale=1 / TEMPERATURE, **setting, **gather)
        loss.model = self.called  # as its own trainer does
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            # The loss takes parts out of what it is given.
            loss([dict(side) for side in features], None).backward()

    def trials(self, pairs: int, before: Callable[[], None]) -> dict[str, float | None]:
        """Return the seconds of a step on some pairs with each setting; None: it does not fit into memory. Collective."""
        settings = SETTINGS[self.world.device.type]
        ways = {named(setting): functools.partial(self.step, pairs, setting) for setting in settings}
        return try_settings(ways, self.world, before)


def best_setting(trials: Mapping[str, float | None], device: torch.device) -> Setting | None:
    """Return the setting with the shortest step; None: none fits."""
    fitting = {name: seconds for name, seconds in trials.items() if seconds is not None}
    return next((s for s in SETTINGS[device.type] if fitting and named(s) == min(fitting, key=lambda n: fitting[n])), None)


def named(setting: Setting) -> str:
    """Return a setting as people write it."""
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def open_peer(folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a SentenceTransformer, by its own flash attention where that is installed and the dtype allows it."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(NOT_INSTALLED) from error
    fast = device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available()
    options: dict[str, Any] = {"model_kwargs": {"attn_implementation": "flash_attention_2"}} if fast else {}
    return SentenceTransformer(folder, device=str(device), **options)
