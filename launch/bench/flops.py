"""Operations of a step, by the sizes of its matrices: what a share of a matrix rate is counted from, and what a plan expects."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from transformers import PretrainedConfig

from gradcache import LossOptions
from gradcache.loss_memory import LossSizes
from gradcache.widths import plan_views
from trainer.encoder.towers import Encoder


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """The operations of a token in a forward: 2 for each weight of a matrix, and those of attention."""

    weights: float
    trained_weights: float  # the part of it whose matrices have a gradient; the others cost no product for one
    attention: float  # for each token that it attends to: 4 a width of all heads and layer

    def forward(self, tokens: float, squared_tokens: float) -> float:
        """Return those of texts; squared_tokens: the sum of their squared lengths."""
        return self.weights * tokens + self.attention * squared_tokens

    def backward(self, tokens: float, squared_tokens: float) -> float:
        """Return those of the backward: the inputs' gradients, and those of the weights that are trained."""
        return (self.weights + self.trained_weights) * tokens + 2 * self.attention * squared_tokens


def token_flops(encoder: nn.Module) -> TokenFlops:
    """Return the operations of a token. Of two towers a text goes through one, and they count as equal."""
    towers = [module for module in encoder.modules() if isinstance(module, Encoder) and not module.has_two_towers]
    matrices = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    config = towers[0].model.config
    return TokenFlops(
        weights=2.0 * sum(map(_numel, matrices)) / len(towers),
        trained_weights=2.0 * sum(_numel(weight) for weight in matrices if weight.requires_grad) / len(towers),
        attention=4.0 * _heads_width(config) * config.num_hidden_layers,
    )


def forward_flops(encoder: nn.Module, lengths: np.ndarray) -> float:
    """Return the operations of one forward of texts of so many tokens. Padding does not count."""
    tokens = lengths.astype(np.float64)
    return token_flops(encoder).forward(float(tokens.sum()), float((tokens**2).sum()))


def loss_flops(options: LossOptions, sizes: LossSizes) -> float:
    """Return the operations of the loss on all ranks: scores, and the gradients of both sides, each once.

    Scores that are computed twice, because they are not kept, count once; an objective that looks at no columns counts as none.
    """
    if not options.objective.sees_columns:
        return 0.0
    views = plan_views(options.widths, options.width_weights, {"embedding": sizes.width}, options.outputs)
    columns = sizes.passages + sizes.queries * options.same_side
    if options.symmetric:
        columns += sizes.queries + sizes.passages * options.same_side
    return 3.0 * 2 * sizes.queries * columns * sum(view.stop - view.first for view in views)


def _numel(weight: Tensor) -> int:
    return getattr(weight, "ds_numel", weight.numel())  # DeepSpeed takes a parameter's values out of it


def _heads_width(config: PretrainedConfig) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * config.num_attention_heads)
