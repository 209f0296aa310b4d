"""Runs a transformer's layers by torch.compile while it trains; where that fails, it warns and runs them without.

Layers are compiled one by one: they share one compilation, FSDP shards them one by one, and parts between them that
torch.compile does not take do no harm. A kind of layer is compiled for few kinds of input, whatever the chunks of a step are:
with and without graph, each for one row and for several. A graph counts twice where the first layer's input needs no gradient
(adapters), and where some are kept and others keep no activations. Numbers of rows and tokens are no kinds of their own, and
attention always gets a mask where chunks are padded. A seed replays a dropout in the encoding without graph and in the one
with graph.

Evaluation and mining run plain layers. A shard of embeddings is to be the same to the last bit whoever makes it, and what a
compiler makes follows the shapes that it was first given; its fifth of the time is not worth embeddings that the trainer's
evaluation and the miner could not share, or that a failed compilation would split in two.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gradcache.gates import backwards_compiled_at_once
from trainer.encoder.attention import ATTENTION, without_cudnn
from trainer.encoder.backbone import layers_of
from trainer.encoder.dropout import Dropout

log = logging.getLogger(__name__)

# Inductor's own random numbers differ between a graph that is differentiated and one that is not.
HOW: dict[str, Any] = {"backend": "inductor", "dynamic": True, "options": {"fallback_random": True}}
MASKED = "negpool_masked"  # attention by torch, under a mask also where none is needed: one kind of input, and torch's draws
FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
MOST_REASON = 200  # characters of a compiler's message


class CompiledLayers:
    """The layers of one model: compiled ones in training until the first failure, plain ones in evaluation."""

    def __init__(self, model: PreTrainedModel, is_packed: bool = False):
        """is_packed: whether all inputs will be packed, so that attention never gets a mask."""
        self._model, self.is_packed = model, is_packed
        self._plain_attention = model.config._attn_implementation
        self._takes_masks = not is_packed and self._plain_attention == ATTENTION
        self._compiled = [(layer, torch.compile(layer._call_impl, **HOW)) for layer in layers_of(model)]
        # From here on plain layers draw as compiled ones do, so that a chunk is replayed by either.
        self._dropouts = _replace_dropouts(layers_of(model))
        self.serve(model.training)

    @property
    def is_used(self) -> bool:
        """Whether training runs compiled layers: none has failed yet."""
        return bool(self._compiled)

    def serve(self, trains: bool) -> None:
        """Have the model's layers run compiled, or plain for evaluation."""
        for layer, compiled in self._compiled:
            layer._compiled_call_impl = compiled if trains else None
        if self._takes_masks:
            self._model.set_attn_implementation(MASKED if trains else ATTENTION)

    def call(self, run: Callable[[], Any]) -> Any:
        """Return run(), by compiled layers; by plain ones, which draw alike, if a layer does not compile now."""
        if not self._compiled:
            return run()
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        generators = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
        try:
            with compiling_as_we_need():
                return run()
        except FAILURES as error:
            self.give_up(in_short(error))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            limit = torch._dynamo.config.recompile_limit
            self.give_up(f"they meet more kinds of input than torch._dynamo.config.recompile_limit={limit} allows")
        torch.set_rng_state(generators[0])
        for device, state in zip(devices, generators[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        return run()

    def give_up(self, reason: str) -> None:
        """Run plain layers from here on, and say why once."""
        if self._compiled:
            log.warning("model.compile: the layers do not compile (%s); they run in plain torch, slower", reason)
        for layer, _ in self._compiled:
            layer._compiled_call_impl = None
        self._compiled = []

    def put_back(self) -> None:
        """Let plain layers draw in our own way again: only where nothing of a step was drawn in the other."""
        assert not self._compiled
        self.serve(trains=False)
        for parent, name, dropout in self._dropouts:
            setattr(parent, name, dropout.train(parent.training))


def in_short(error: Exception) -> str:
    """Return the beginning of what a compiler says, on one line."""
    return " ".join(str(error).split())[:MOST_REASON]


def as_layers_take_it(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return padded inputs with a mask, and with a second column where they have one: a size of one is a kind of its own.

    Packed ones, which never have a mask, stay as they are.
    """
    if "starts" in inputs:
        return inputs
    ids_nL = inputs["input_ids"]
    taken = {"attention_mask": torch.ones_like(ids_nL), **inputs}
    if ids_nL.shape[1] > 1:
        return taken
    return {name: nn.functional.pad(values, (0, 1)) for name, values in taken.items()}


def _replace_dropouts(layers: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Dropout]]:
    """Put torch's own dropout in the place of ours; return ours, and where each was."""
    found = [
        (parent, name, child)
        for layer in layers
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is Dropout
    ]
    for parent, name, child in found:
        setattr(parent, name, nn.Dropout(child.p, child.inplace).train(child.training))
    return found


@contextlib.contextmanager
def compiling_as_we_need() -> Iterator[None]:
    """Set, during the block and for nobody else who compiles in this process, what torch.compile has no argument for."""
    with contextlib.ExitStack() as settings:
        # At the limit torch would go on without a compiled layer, and leave one line among its own warnings.
        settings.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        # As many rows as tokens in the first chunk would otherwise be taken for a rule, and other chunks be compiled for anew.
        settings.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
        # A failure of the backward's compilation shows in the forward, where plain layers can take its place.
        settings.enter_context(backwards_compiled_at_once())
        yield


def _attend(module: nn.Module, query: Tensor, *more: Any, **options: Any) -> tuple[Tensor, None]:
    with without_cudnn(query.device):
        return sdpa_attention_forward(module, query, *more, **options)


def _always_mask(**options: Any) -> Tensor | None:
    return sdpa_mask(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(MASKED, _attend)
AttentionMaskInterface.register(MASKED, _always_mask)
