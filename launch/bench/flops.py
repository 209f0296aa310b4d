"""Operations of a step, by the sizes of its matrices: what a share of a matrix rate is counted from."""

import numpy as np
from torch import Tensor, nn

from gradcache import LossOptions
from gradcache.loss_memory import LossSizes
from gradcache.widths import plan_views
from trainer.encoder.towers import Encoder


def forward_flops(encoder: nn.Module, lengths: np.ndarray) -> float:
    """Return the operations of one forward of texts of so many tokens. Padding does not count."""
    tokens = lengths.astype(np.float64)
    return flops_of_tokens(encoder, tokens.sum(), (tokens**2).sum())


def flops_of_tokens(encoder: nn.Module, tokens: float, squared_tokens: float) -> float:
    """Return the operations of one forward: 2 a matrix weight and token, and 4 L² a width and layer of attention.

    A forward and its backward are three times as many: 6 a weight and token. Of two towers a text goes through one, and they
    count as equal. squared_tokens: the sum of the texts' squared lengths.
    """
    towers = [module for module in encoder.modules() if isinstance(module, Encoder) and not module.has_two_towers]
    weights = sum(_numel(m.weight) for m in encoder.modules() if isinstance(m, nn.Linear)) / len(towers)
    config = towers[0].model.config
    return float(2 * weights * tokens + 4 * config.hidden_size * config.num_hidden_layers * squared_tokens)


def trained_share(encoder: nn.Module) -> float:
    """Return the share of the matrix weights that have a gradient; the others cost no product for one."""
    weights = [m.weight for m in encoder.modules() if isinstance(m, nn.Linear)]
    return sum(_numel(weight) for weight in weights if weight.requires_grad) / max(1, sum(map(_numel, weights)))


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
