"""Attention as transformers' models call it, for padded rows and for packed ones, without a plan or a mask that nobody needs.

Packed rows stand one behind the other without padding, and no token sees another row's. On a GPU in 16 bits that is one flash
call over varying lengths, with dropout; elsewhere rows are padded for the call, which is the reference of the other.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.encoder.dropout import dropped_attention

# n rows, H heads, T tokens of all rows, L tokens of the longest row, d width of a head

ATTENTION = "negpool"  # name of `attention_forward` for transformers
# cuDNN, which torch prefers on some GPUs, builds a plan for every new shape, up to a second each; our chunks bring many.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EXTRAS = ("position_bias", "cache", "softcap", "s_aux")  # what some families add to attention
HALVES = (torch.bfloat16, torch.float16)


def packed_marker(device: torch.device) -> Tensor:
    """Return what stands for the mask of packed rows: models hand four dimensions down as they are, and build none of (T, T).

    It has no elements, so whatever would take it for a mask fails.
    """
    return torch.empty(1, 1, 1, 0, dtype=torch.bool, device=device)


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """Return (states (n, L, H, d), None), as transformers' `sdpa` attention does.

    query: (n, H, L, d); key, value: the same, or with fewer heads, each for several of the query's. Of packed rows, n is 1,
    and cu_seq_lens_q are their starts, max_length_q the length of the longest, both by transformers' names.
    Source of the signature: transformers' AttentionInterface.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None:
        if added := [name for name in EXTRAS if kwargs.get(name) is not None]:
            raise NotImplementedError(f"{type(module).__name__} has {added[0]}, with which attention takes no packed texts")
        window = kwargs.get("sliding_window")
        if window is not None and not causal and getattr(module, "is_causal", False):
            window += 1  # transformers' mask of a decoder that was made to look ahead reaches one token farther
        rows = starts, kwargs["max_length_q"], causal, window
        return packed_attention(module, query, key, value, rows, dropout, scaling), None
    if attention_mask is not None and attention_mask.shape[-1] == 0:
        raise NotImplementedError(f"the model around {type(module).__name__} keeps to itself where packed texts start")
    if dropout == 0 or torch.compiler.is_compiling() or not _is_plain(query, key, value, kwargs):
        with without_cudnn(query.device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return dropped_attention(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None


def packed_attention(module, query, key, value, rows: tuple, dropout: float, scaling: float | None) -> Tensor:
    """Return the (1, T, H, d) states of packed rows.

    rows: (starts (n + 1,) int32, length of the longest, whether tokens look back only, how far they look with themselves).
    """
    dtype = flash_dtype(value)
    if dtype is None:
        return _padded(module, query, key, value, rows, dropout, scaling)
    # Rotations and norms may have left float32 behind.
    return _flash(query.to(dtype), key.to(dtype), value.to(dtype), rows, dropout, scaling)


def flash_dtype(value: Tensor) -> torch.dtype | None:
    """Return the 16 bits that products with a value are made in, where torch has a flash kernel for them, else None."""
    if value.device.type != "cuda":
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    return dtype if dtype in HALVES else None


def without_cudnn(device: torch.device) -> AbstractContextManager:
    """Let torch's attention take any of its kernels but cuDNN's during the block; the process keeps its own choice."""
    return sdpa_kernel(BACKENDS) if device.type == "cuda" else nullcontext()


def _flash(query, key, value, rows: tuple, dropout: float, scaling: float | None) -> Tensor:
    starts, longest, causal, window = rows
    # 1HTd -> THd
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    # A window of transformers counts the token itself, one of the kernel does not.
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
    # The public function, torch.nn.attention.varlen, has no dropout; a seed replays this one's.
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, dropout, causal, False, scale=scaling, **sides
    )
    return found[0].unsqueeze(0)


def _padded(module, query, key, value, rows: tuple, dropout: float, scaling: float | None) -> Tensor:
    starts, longest, causal, window = rows
    lengths_n = starts.diff()
    num_rows, num_tokens, device = len(lengths_n), query.shape[2], query.device
    row_T = torch.arange(num_rows, device=device).repeat_interleave(lengths_n, output_size=num_tokens)
    place_T = torch.arange(num_tokens, device=device) - starts[row_T]

    def pad(packed_1HTd: Tensor) -> Tensor:
        packed_THd = packed_1HTd.squeeze(0).transpose(0, 1)
        padded_nLHd = packed_THd.new_zeros(num_rows, longest, *packed_THd.shape[1:])
        return padded_nLHd.index_put((row_T, place_T), packed_THd).transpose(1, 2)

    place_L = torch.arange(longest, device=device)
    ahead_LL = place_L - place_L.unsqueeze(1)  # how far behind the query the key stands
    seen_nLL = (place_L < lengths_n.unsqueeze(1)).unsqueeze(1).expand(-1, longest, -1)
    if causal:
        seen_nLL = seen_nLL & (ahead_LL <= 0)
    if window is not None:
        seen_nLL = seen_nLL & (ahead_LL.abs() < window)
    seen_nLL = seen_nLL | (ahead_LL == 0)  # padding sees something, or its gradient is not a number
    states_nLHd, _ = attention_forward(module, pad(query), pad(key), pad(value), seen_nLL.unsqueeze(1), dropout, scaling, False)
    return states_nLHd[row_T, place_T].unsqueeze(0)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, kwargs: dict) -> bool:
    """Return whether attention is of one text with itself, in float32 on the CPU, with nothing added to it."""
    is_whole = query.shape[2] == key.shape[2] and key.shape == value.shape and query.shape[3] == key.shape[3]
    is_extended = any(kwargs.get(name) is not None for name in EXTRAS)
    return is_whole and not is_extended and query.dtype == torch.float32 and query.device.type == "cpu"


def mask_of(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """Return the mask that transformers builds for `sdpa`; off the CPU from every mask that is given.

    To see whether it masks anything the host would wait for the device.
    """
    if attention_mask is not None and attention_mask.device.type != "cpu":
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, mask_of)
