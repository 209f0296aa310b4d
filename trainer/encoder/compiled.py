"""Runs a transformer's layers by torch.compile; where that fails, it warns and runs them without.

Layers are compiled one by one: they share one compilation, FSDP shards them one by one, and parts between them that
torch.compile does not take do no harm. A seed replays a dropout in the encoding without graph and in the one with graph.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradcache.replay import borrowed_generators
from trainer.encoder.backbone import layers_of

log = logging.getLogger(__name__)

# Inductor's own random numbers differ between a graph that is differentiated and one that is not.
HOW: dict[str, Any] = {"backend": "inductor", "dynamic": True, "options": {"fallback_random": True}}


class CompiledLayers:
    """Calls a model whose layers are compiled, until the first failure."""

    def __init__(self, model: nn.Module):
        self._layers = layers_of(model)
        self._is_tried = False
        for layer in self._layers:
            layer.compile(**HOW)

    @property
    def is_used(self) -> bool:
        """Whether layers are compiled, and none has failed yet."""
        return bool(self._layers)

    def call(self, run: Callable):
        """Return run(), by compiled layers if they can be had.

        The first call tries both kinds of graph before it is needed. If compilation failed between the two encodings of a
        step, they would draw different dropout.
        """
        if self._layers and not self._is_tried and not torch.is_inference_mode_enabled():
            self._is_tried = True
            with borrowed_generators():
                for with_graph in (False, True):
                    with torch.set_grad_enabled(with_graph):
                        self._call(run)
        return self._call(run)

    def _call(self, run: Callable):
        try:
            return run()
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if not self._layers:
                raise
            reason = " ".join(str(error).split())[:200]
            log.warning("model.compile=true does not work here (%s); going on without it", reason)
            for layer in self._layers:
                layer._compiled_call_impl = None
            self._layers = []
        return run()
