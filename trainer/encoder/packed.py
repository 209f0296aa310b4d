"""Which encoders take packed texts, one behind the other without padding, and what the transformer is given then.

Inputs of a packed chunk of n texts with T tokens in all: `input_ids` (T,) int64; `starts` (n + 1,) int32, the first token of
each text, and T; `longest`, a Python number, tokens of the longest text or more; perhaps `pooled_mask` (T,).
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.encoder.attention import ATTENTION, HALVES, packed_marker
from trainer.encoder.backbone import first_position
from trainer.encoder.rows import Packed

# Families whose layers hand the starts of texts down to attention, and do nothing else between tokens. A test proves each.
PACKED_FAMILIES = frozenset({
    "bert", "camembert", "distilbert", "electra", "eurobert", "gemma", "gemma3_text", "granite", "llama", "mistral", "modernbert",
    "nomic_bert", "olmo2", "phi3", "qwen2", "qwen3", "roberta", "xlm-roberta",
})  # fmt: skip
WIDEST_HEAD = 256  # of torch's flash kernel
# Above this width its backward needs the shared memory of these GPUs (compute capability). Source: torch's own check for SDPA.
WIDE_HEAD, WIDE_HEADS_ON = 192, ((8, 0), (9, 0), (10, 0))


class Sided(Protocol):
    """An encoder, as far as it matters here: that of a side has its transformer as `model`."""

    def side(self, side: Literal["query", "passage"]) -> Any: ...


def packs(encoder: Sided, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether an encoder takes packed texts on a device, its products (autocast) being in a type."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in HALVES:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return False
    widest = WIDEST_HEAD if capability in WIDE_HEADS_ON else WIDE_HEAD
    return all(is_packable(encoder.side(side).model, widest) for side in ("query", "passage"))


def is_packable(model: PreTrainedModel, widest_head: int = WIDEST_HEAD) -> bool:
    """Return whether a transformer keeps packed texts apart, with heads of at most this width."""
    config = model.config
    if config.model_type not in PACKED_FAMILIES or config._attn_implementation != ATTENTION:
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width % 8 == 0 and width <= widest_head


def transformer_inputs(model: PreTrainedModel, ids_T: Tensor, rows: Packed) -> dict[str, Any]:
    """Return the arguments of a transformer for packed texts, as one row; by transformers' names for what attention needs."""
    if not is_packable(model):
        raise ValueError(f"a model of type {model.config.model_type} takes no packed texts; see packs()")
    # With texts of one token each the kernel would regroup the heads, and torch.compile would compile once more.
    longest = max(2, rows.longest)
    return {
        "input_ids": ids_T.unsqueeze(0),
        "attention_mask": packed_marker(ids_T.device),
        "position_ids": (rows.places(len(ids_T)) + first_position(model)).unsqueeze(0),
        "cu_seq_lens_q": rows.starts,
        "cu_seq_lens_k": rows.starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
