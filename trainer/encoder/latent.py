"""Latent attention: a pooling with weights, in which every token state attends to trained vectors before the mean.

Source: NV-Embed, arXiv 2405.17428, section 3.1.2; norms and residuals as in the weights published with it.
"""

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.encoder.attention import without_cudnn
from trainer.encoder.pooling import mean
from trainer.encoder.rows import Rows, rows_of

# n rows, L tokens, D width, r latents, H heads
MOST_HEADS = 8  # of the paper
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class LatentAttention(nn.Module):
    """Token states attend to `num_latents` trained vectors, pass an MLP, and are averaged."""

    def __init__(self, width: int, num_latents: int):
        super().__init__()
        self.num_heads = math.gcd(width, MOST_HEADS)
        self.latents_rD = nn.Parameter(torch.randn(num_latents, width))
        self.norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor, rows: Rows) -> Tensor:
        """Return the (n, D) mean over the pooled tokens of states of (n, L, D), or of packed ones of (T, D)."""
        batch = states if states.ndim == 3 else states.unsqueeze(0)
        states = states + self.out(self._attend(self.norm(batch))).view_as(states)
        return mean(states + self.mlp(self.mlp_norm(states)), rows)

    def _attend(self, states_nLD: Tensor) -> Tensor:
        key_rD, value_rD = self.key_value(self.latent_norm(self.latents_rD)).chunk(2, dim=-1)
        # nLHd -> nHLd; the latents are the same for every row
        query_nHLd = _in_heads(self.query(states_nLD), self.num_heads)
        key_1Hrd, value_1Hrd = (_in_heads(t.unsqueeze(0), self.num_heads) for t in (key_rD, value_rD))
        with without_cudnn(states_nLD.device):
            attended = nn.functional.scaled_dot_product_attention(
                query_nHLd, key_1Hrd.expand(len(states_nLD), -1, -1, -1), value_1Hrd.expand(len(states_nLD), -1, -1, -1)
            )
        return attended.transpose(1, 2).flatten(2)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the sizes, and the weights under the names of `state_dict`."""
        num_latents, width = self.latents_rD.shape
        (folder / CONFIG).write_text(json.dumps({"width": width, "num_latents": num_latents}, indent=1))
        safetensors.torch.save_file(weights, folder / WEIGHTS)

    @classmethod
    def read(cls, folder: Path) -> "LatentAttention":
        """Return what `save` wrote."""
        module = cls(**json.loads((folder / CONFIG).read_text()))
        module.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        return module


def _in_heads(states_nLD: Tensor, num_heads: int) -> Tensor:
    """Return (n, H, L, d): the width cut into heads."""
    return states_nLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class LatentPooling(nn.Module):
    """Latent attention as sentence-transformers calls a module, for a reader who trusts our code."""

    def __init__(self, attention: LatentAttention):
        super().__init__()
        self.attention = attention

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `sentence_embedding`."""
        features["sentence_embedding"] = self.attention(features["token_embeddings"], rows_of(features))
        return features

    def get_embedding_dimension(self) -> int:
        """Return the width."""
        return self.attention.latents_rD.shape[1]

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_) -> "LatentPooling":
        """Return the pooling of a model's folder."""
        return cls(LatentAttention.read(Path(model_name_or_path) / subfolder))
