"""Dropout and attention dropout on the CPU at the speed of memory: one random byte decides each element.

Torch draws one Mersenne number per element there, in one thread, which makes a training forward of BERT with dropout more
than twice as slow as one without; and with dropout it gives up its fused attention. Here eight elements share a draw,
so a rate is rounded to 1/256, and attention is evaluated in blocks that stay in the cache, the probabilities again in
backward. The draws come from torch's default generator, so a seed replays them. A GPU and torch.compile keep torch's own.
Source of the blockwise backward: FlashAttention (Dao et al. 2022, arXiv 2205.14135).
"""

import torch
from torch import Tensor, nn

# n rows, H heads, L tokens, D width of a head, b rows of a block

BLOCK_ELEMENTS = 2**20  # attention probabilities of a block: 4 MiB, some of which fits every second-level cache


def keep_mask(like: Tensor, rate: float) -> tuple[Tensor, float]:
    """Return (bool mask of the shape of `like`, True with probability 1 - rate; 1 / the exact share kept)."""
    dropped = min(255, max(1, round(rate * 256)))
    count = like.numel()
    bits = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    return bits.view(torch.uint8)[:count].view(like.shape) >= dropped, 256 / (256 - dropped)


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with some elements 0 and the others scaled, while training."""
        if not self.training or self.p == 0 or self.inplace or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        return _Dropout.apply(input, self.p)


def replace_dropout(module: nn.Module) -> None:
    """Put `Dropout` in the place of every `nn.Dropout` below a module."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, child.inplace).train(child.training))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rate: float) -> Tensor:
        mask, ctx.scale = keep_mask(values, rate)
        ctx.save_for_backward(mask)
        return (values * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None


def dropped_attention(query, key, value, mask: Tensor | None, rate: float, scaling: float | None) -> Tensor:
    """Return softmax(scaling * query @ key^T + mask), dropped out, @ value, all (n, H, L, D), in blocks.

    key, value: as many heads as the query, or fewer, each for several of the query's. mask: True where a key is seen, or what
    is added.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    queries_per_key = query.shape[1] // key.shape[1]
    if queries_per_key > 1:
        key, value = (t.repeat_interleave(queries_per_key, dim=1) for t in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, mask, rate, scaling)


class _Attention(torch.autograd.Function):
    """softmax(scaling * query @ key^T + bias), dropped out, @ value, in blocks of rows."""

    @staticmethod
    def forward(ctx, query, key, value, bias, rate, scaling):
        num_rows, num_heads, num_tokens, _ = query.shape
        ctx.block = max(1, BLOCK_ELEMENTS // (num_heads * num_tokens**2))
        output = torch.empty_like(value)
        masks = []
        for rows in _blocks(num_rows, ctx.block):
            probability = _probabilities(query, key, bias, rows, scaling)
            mask, ctx.scale = keep_mask(probability, rate)
            masks.append(mask)
            output[rows] = (probability.mul_(mask) @ value[rows]).mul_(ctx.scale)
        ctx.scaling = scaling
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, bias, *masks)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, bias, *masks = ctx.saved_tensors
        query_gradient, key_gradient, value_gradient = (torch.empty_like(t) for t in (query, key, value))
        for rows, mask in zip(_blocks(len(query), ctx.block), masks, strict=True):
            probability = _probabilities(query, key, bias, rows, ctx.scaling)
            scaled = gradient[rows] * ctx.scale
            value_gradient[rows] = (probability * mask).transpose(-1, -2) @ scaled
            dropped = (scaled @ value[rows].transpose(-1, -2)).mul_(mask)
            logits = torch._softmax_backward_data(dropped, probability, -1, probability.dtype).mul_(ctx.scaling)
            query_gradient[rows] = logits @ key[rows]
            key_gradient[rows] = logits.transpose(-1, -2) @ query[rows]
        return query_gradient, key_gradient, value_gradient, None, None, None


def _blocks(num_rows: int, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, num_rows, block)]


def _probabilities(query, key, bias, rows: slice, scaling: float) -> Tensor:
    """Return the softmax of one block, (b, H, L, L)."""
    logits = (query[rows] * scaling) @ key[rows].transpose(-1, -2)
    if bias is not None:
        logits += bias[rows] if len(bias) > 1 else bias
    return torch.softmax(logits, -1)
