"""The job's model without its weights: parameters, operations of a token, and what a token's graph holds.

Only a configuration is needed: of the model's folder, of the hub, or of a shape that `launch/bench/shapes.py` knows. Everything
runs on tensors that have shapes and no memory, so a model of 7 billion parameters takes seconds.
"""

from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PretrainedConfig

from gradcache.budget import PROBE_TOKENS, GraphCost, saved_bytes
from launch.bench.flops import TokenFlops, token_flops
from launch.bench.shapes import config_of
from trainer.encoder.architecture import load_config, without_pooler
from trainer.encoder.backbone import checkpoint_activations, is_decoder, max_positions, ready_backbone, with_dropout
from trainer.encoder.encode import DTYPES
from trainer.encoder.layers import Dense
from trainer.encoder.lora import add_adapters
from trainer.encoder.opened import describe
from trainer.encoder.pooling import num_poolings, pooling_of
from trainer.encoder.settings import ModelSettings, Traits
from trainer.encoder.source import PACKAGES
from trainer.encoder.towers import Encoder, TwoTowers

ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
SHORT = 4  # times that the shorter of two probes is shorter
DEEP, FEW_LAYERS = 12, (2, 4)  # a model of more layers is probed with so many of them


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """What a plan knows of a model."""

    name: str
    source: str  # where its shape comes from
    encoder: Encoder  # of tensors without memory
    traits: Traits  # lengths among them
    flops: TokenFlops
    graph: GraphCost  # that is kept
    graph_at_work: GraphCost  # of a chunk that is encoded again: less, where activations are computed again
    num_layers: int  # of a text's way through one tower
    num_layers_of_all: int  # of all towers
    layer_parameters: int  # of the largest layer
    other_parameters: int  # outside of the layers

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.encoder.width

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(p.numel() for p in self.encoder.parameters())

    @property
    def num_trained(self) -> int:
        """Those that get a gradient."""
        return sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)

    def forward_flops(self, tokens: float, length: float) -> float:
        """Return the operations of a forward of so many tokens in texts of one length."""
        return self.flops.forward(tokens, tokens * length)

    def backward_flops(self, tokens: float, length: float) -> float:
        """Return those of the backward."""
        return self.flops.backward(tokens, tokens * length)


def planned_model(settings: ModelSettings, encode: str, device_type: str) -> PlannedModel:
    """Return the model of a job. encode: the precision of its products. Raises InputError where no configuration is found."""
    config, source, recorded = _configuration(settings)
    towers = [_tower(config, settings, recorded, device_type) for _ in range(2 if settings.towers == "two" else 1)]
    traits = towers[0][1]
    encoder = towers[0][0] if len(towers) == 1 else TwoTowers(*(tower for tower, _ in towers))
    with FakeTensorMode():
        _take_memory(encoder)
        about = encoder.side("passage"), traits.max_passage_tokens, encode, device_type == "cuda"
        graph = at_work = measure_graph(*about)
        if settings.checkpoint_activations:
            checkpoint_activations(encoder.side("passage").model)
            at_work = measure_graph(*about)
    layers = encoder.layers()
    of_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return PlannedModel(
        name=settings.name,
        source=source,
        encoder=encoder,
        traits=traits,
        flops=token_flops(encoder),
        graph=graph,
        graph_at_work=at_work,
        num_layers_of_all=max(1, len(layers)),
        num_layers=len(encoder.side("passage").layers()),
        layer_parameters=max(of_layers, default=0),
        other_parameters=sum(p.numel() for p in encoder.parameters()) - sum(of_layers),
    )


def measure_graph(encoder: Encoder, longest: int, encode: str, is_packed: bool) -> GraphCost:
    """Return what a chunk's graph holds, by probes of texts without padding, as `gradcache/budget.py` measures it.

    is_packed: attention keeps nothing for pairs of tokens. Of a deep model a few layers are run, and the others are like them.
    """
    parent, name = _place_of_layers(encoder)
    layers = getattr(parent, name) if parent is not None else nn.ModuleList()
    if parent is None or len(layers) <= DEEP:
        return _probe_graph(encoder, longest, encode, is_packed)
    costs = []
    try:
        for count in FEW_LAYERS:
            setattr(parent, name, nn.ModuleList(layers[:count]))
            costs.append(_probe_graph(encoder, longest, encode, is_packed))
    finally:
        setattr(parent, name, layers)
    few, many = costs
    share = (len(layers) - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    return GraphCost(*(a + share * (b - a) for a, b in zip(astuple(few), astuple(many), strict=True)))


def _probe_graph(encoder: Encoder, longest: int, encode: str, is_packed: bool) -> GraphCost:
    length = max(SHORT, longest)
    rows = max(1, PROBE_TOKENS // length)
    few, many = (_graph_bytes(encoder, n, length, encode) for n in (rows, 2 * rows))
    per_token = (many - few) / (rows * length)
    fixed = max(0.0, few - per_token * rows * length)
    if is_packed:
        return GraphCost(fixed, per_token)
    short = length // SHORT
    short_token = (_graph_bytes(encoder, SHORT * rows, short, encode) - fixed) / (SHORT * rows * short)
    per_pair = max(0.0, (per_token - short_token) / (length - short))
    return GraphCost(fixed, per_token - per_pair * length, per_pair)


def _place_of_layers(encoder: Encoder) -> tuple[nn.Module | None, str]:
    """Return the module that has the list of layers, and the list's name there."""
    lists = [(parent, name, child) for parent in encoder.model.modules() for name, child in parent.named_children()]
    found = [place for place in lists if isinstance(place[2], nn.ModuleList)]
    if not found:
        return None, ""
    parent, name, _ = max(found, key=lambda place: len(list(place[2].children())))
    return parent, name


def _graph_bytes(encoder: Encoder, rows: int, length: int, encode: str) -> float:
    """Return the bytes that autograd saves of texts that need no padding; what several products share counts once."""
    dtype = DTYPES[encode]
    ids = torch.zeros(rows, length, dtype=torch.int64)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return encoder.model(input_ids=ids).last_hidden_state

    return float(saved_bytes(forward))


def _configuration(settings: ModelSettings) -> tuple[PretrainedConfig, str, dict]:
    """Return the configuration, where it comes from, and what the folder records of lengths and pooling."""
    is_here = Path(settings.name).expanduser().is_dir() or settings.name in PACKAGES
    config = None if is_here else config_of(settings.name)
    if config is not None:
        return config, "a shape that negpool knows", {}
    recorded = describe(replace(settings, pooling=settings.pooling or "mean"), with_weights=False)[-1]
    return load_config(recorded.transformer, **recorded.config_args), recorded.transformer, recorded.traits


def _tower(config: PretrainedConfig, settings: ModelSettings, recorded: dict, device_type: str) -> tuple[Encoder, Traits]:
    config = with_dropout(config, settings.dropout)
    for name in ATTENTION_DROPOUTS:  # a GPU's attention keeps no probabilities, dropped or not; that of fake tensors would
        if device_type == "cuda" and hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        model = AutoModel.from_config(config, **without_pooler(config))
    # The first two change no shape, and would look at values; activations are dropped when kept graphs are measured.
    model = ready_backbone(model, replace(settings, attention=None, quantize=None, checkpoint_activations=False))
    if settings.lora_rank:
        add_adapters(model, settings)
    pooling = settings.pooling or recorded.get("pooling") or ("last" if is_decoder(model) else "mean")
    width = num_poolings(pooling) * model.config.hidden_size
    dense = [] if settings.projection in (None, width) else [Dense(width, settings.projection)]
    longest = min(max_positions(model), 512)
    traits = Traits(
        pooling=pooling,
        normalize=settings.normalize is not False,
        query_prefix=settings.query_prefix or "",
        passage_prefix=settings.passage_prefix or "",
        max_query_tokens=settings.max_query_tokens or recorded.get("max_query_tokens") or longest,
        max_passage_tokens=settings.max_passage_tokens or recorded.get("max_passage_tokens") or longest,
        width=settings.width or recorded.get("width"),
    )
    return Encoder(model, pooling_of(pooling) or pooling_of("mean"), dense, traits).train(), traits  # type: ignore[arg-type]


def _take_memory(encoder: nn.Module) -> None:
    """Put fake tensors of a CPU in the place of all that is on the meta device, where autocast and attention do nothing."""
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
