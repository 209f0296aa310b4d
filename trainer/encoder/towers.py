"""Token ids to one vector a text: one encoder for both sides, or one for each."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.encoder.backbone import checkpoint_activations, layers_of, positions_from_mask
from trainer.encoder.compiled import CompiledLayers, as_layers_take_it
from trainer.encoder.layers import Layer, width_behind
from trainer.encoder.packed import transformer_inputs
from trainer.encoder.pooling import Pooling, num_poolings
from trainer.encoder.rows import Packed, Padded, rows_of
from trainer.encoder.settings import Traits

# n rows, L tokens, D width
Side = Literal["query", "passage"]
SIDES: tuple[Side, Side] = ("query", "passage")


class Encoder(nn.Module):
    """Token ids to one vector a text; the module that is trained, wrapped and saved."""

    has_two_towers = False  # if so, `forward` must be told the side of its texts
    _compiled: CompiledLayers | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pooling,
        layers: Sequence[Layer],
        traits: Traits,
    ):
        """layers: behind the pooling, in their order, of which every embedding then has its first `traits.width` numbers."""
        super().__init__()
        self.model = model
        self.pool = pool
        self.dense = nn.ModuleList(layers)  # all of them: checkpoints know them by this name
        self.normalize = traits.normalize
        self._num_poolings = num_poolings(traits.pooling)
        self.cut = traits.width
        self._needs_positions = positions_from_mask(model)

    def forward(self, inputs: Mapping[str, Any], keep_activations: bool = False) -> Tensor:
        """Return (n, D) embeddings of `input_ids` and `attention_mask`, each (n, L), padded on either side.

        Without `attention_mask` no token is padding. `pooled_mask`, where it is among the inputs, is of the tokens that are
        pooled: those behind the prompt. Packed texts have `starts` and `longest` instead, see packed.py.
        keep_activations: recompute none in backward, also where the model's layers are set to.
        """
        if self._compiled is not None and self.training:
            inputs = as_layers_take_it(inputs)
        rows = rows_of(inputs)
        with self._checkpointing_paused(keep_activations):
            states = self._run(self._taken(inputs["input_ids"], rows))
        embedding_nD = self.pool(states.squeeze(0) if isinstance(rows, Packed) else states, rows)
        for layer in self.dense:
            embedding_nD = layer(embedding_nD)
        embedding_nD = embedding_nD[:, : self.cut]
        return nn.functional.normalize(embedding_nD, dim=-1) if self.normalize else embedding_nD

    def side(self, side: Side) -> "Encoder":
        """Return the encoder of a side's texts: this one, for both."""
        return self

    def part(self, side: Side) -> str | None:
        """Return the name under which `side` is part of this encoder; None where it is all of it."""
        return None

    def layers(self) -> list[nn.Module]:
        """Return the repeated layers of the transformer."""
        return layers_of(self.model)

    def train(self, mode: bool = True) -> "Encoder":
        """Train or evaluate, as of any module; layers are compiled in training alone."""
        super().train(mode)
        if self._compiled is not None:
            self._compiled.serve(mode)
        return self

    def compile_layers(self, is_packed: bool = False) -> None:
        """Have training run its layers by torch.compile, from the next call on. is_packed: whether all inputs will be packed."""
        self._compiled = CompiledLayers(self.model, is_packed)

    def leave_compiled(self, reason: str) -> None:
        """Run plain layers again, and say why once: only between steps, because plain ones then draw in their own way."""
        if self._compiled is not None:
            self._compiled.give_up(reason)
            self._compiled.put_back()
            self._compiled = None

    @property
    def width(self) -> int:
        whole = self.whole_width
        return whole if self.cut is None else min(self.cut, whole)

    @property
    def whole_width(self) -> int:
        """Width of an embedding of which nothing is cut off."""
        return width_behind(self.dense, self.pooled_width)  # type: ignore[arg-type]

    @property
    def pooled_width(self) -> int:
        """Width of what the pooling makes."""
        return self._num_poolings * self.state_width

    @property
    def is_compiled(self) -> bool:
        """Whether its layers are run by torch.compile while it trains."""
        return self._compiled is not None and self._compiled.is_used

    @property
    def is_quantized(self) -> bool:
        """Whether its layers multiply by weights of a few bits."""
        return getattr(self.model, "hf_quantizer", None) is not None

    @property
    def state_width(self) -> int:
        """Width of a token's state."""
        return self.model.config.hidden_size

    def _taken(self, ids: Tensor, rows: Padded | Packed) -> dict[str, Any]:
        """Return what the transformer is given."""
        if isinstance(rows, Packed):
            return transformer_inputs(self.model, ids, rows)
        taken = {"input_ids": ids, "attention_mask": rows.real}
        if self._needs_positions:
            taken["position_ids"] = rows.places()
        return taken

    def _run(self, inputs: Mapping[str, Any]) -> Tensor:
        run = functools.partial(self.model, **inputs)
        compiled = self._compiled if self.training else None
        return (run() if compiled is None else compiled.call(run)).last_hidden_state

    @contextmanager
    def _checkpointing_paused(self, keep_activations: bool) -> Iterator[None]:
        is_paused = keep_activations and self.model.is_activation_checkpointing
        if is_paused:
            self.model.activation_checkpointing_disable()
        try:
            yield
        finally:
            if is_paused:
                checkpoint_activations(self.model)


class TwoTowers(Encoder):
    """An encoder for queries and one for passages, with weights of their own.

    Both are one module, so that a parallel backend wraps, synchronises and saves them together.
    """

    has_two_towers = True

    def __init__(self, query: Encoder, passage: Encoder):
        nn.Module.__init__(self)
        self.query, self.passage = query, passage
        self.normalize = query.normalize

    def forward(self, inputs: Mapping[str, Any], keep_activations: bool = False, side: Side | None = None) -> Tensor:
        """Return (n, D) embeddings of one side's texts, as `Encoder.forward` does."""
        if side is None:  # no tower is the default, because a mistake would train the wrong one without any sign of it
            raise ValueError(f"two towers must be told whose texts these are: side={' or '.join(SIDES)}")
        return self.side(side)(inputs, keep_activations)

    def side(self, side: Side) -> Encoder:
        """Return the encoder of a side's texts."""
        return self.query if side == "query" else self.passage

    def part(self, side: Side) -> str | None:
        """Return the name under which `side` is part of this encoder."""
        return side

    def layers(self) -> list[nn.Module]:
        """Return the repeated layers of both transformers."""
        return [*self.query.layers(), *self.passage.layers()]

    def compile_layers(self, is_packed: bool = False) -> None:
        """Have training run the layers of both by torch.compile."""
        for side in SIDES:
            self.side(side).compile_layers(is_packed)

    def leave_compiled(self, reason: str) -> None:
        """Run plain layers in both again."""
        for side in SIDES:
            self.side(side).leave_compiled(reason)

    @property
    def width(self) -> int:
        return self.query.width

    @property
    def is_compiled(self) -> bool:
        return self.query.is_compiled and self.passage.is_compiled

    @property
    def is_quantized(self) -> bool:
        return self.query.is_quantized
