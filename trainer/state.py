"""Everything of a training run that must survive a restart, beside weights and moments: a few numbers."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from gradcache import Objective, Temperature
from trainer.budget import RunBudget
from trainer.early_stop import EarlyStop, RollBack
from trainer.ema import NoAverage, WeightAverage
from trainer.optim import moments_of
from trainer.parallel import MOMENTS, Parallel
from trainer.parts import Fragment

COUNTERS = ("step", "negatives_version", "swaps", "seconds", "num_skipped", "skipped_in_row")


@dataclass
class TrainState:
    """The moving parts of a run. The order of data and the learning rate need no more than `step`."""

    parallel: Parallel  # the encoder and its optimizer
    temperature: Temperature
    loss_optimizer: AdamW  # of what the loss learns: the temperature, and numbers of objectives
    scaler: torch.amp.GradScaler  # of float16 gradients
    average: WeightAverage | NoAverage
    early_stop: EarlyStop
    roll_back: RollBack
    step: int = 0  # steps done
    negatives_version: int | None = None  # in force after `step`
    swaps: list[list[int]] = field(default_factory=list)  # [step, version] of every swap so far
    seconds: float = 0.0  # spent in steps, over all starts
    num_skipped: int = 0  # updates left out, because their gradients were not finite
    skipped_in_row: int = 0  # of them, up to `step`; see `count_update`
    budget: RunBudget | None = None  # of memory; found with the first batch
    objectives: Mapping[str, Objective] = field(default_factory=dict)  # "loss", and "sources.NAME" of those with their own

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds of weights, moments and averages, as views."""
        return itertools.chain(self.parallel.fragments(), self.average.fragments())

    def is_whole(self, kind: str) -> bool:
        """Return whether every rank holds all of a kind of fragments."""
        return self.parallel.is_replicated or (kind == "average" and not self.parallel.is_sharded)

    def kept_fragments(self) -> tuple[list[Fragment], set[int]]:
        """Return what this rank is to keep of them, and which ranks keep something."""
        parallel = self.parallel
        own, writers = parallel.kept(parallel.fragments(), parallel.num_shards)
        # Averages are laid out as parameters are, whoever shards the moments.
        averages, of_averages = parallel.kept(self.average.fragments(), parallel.num_shards if parallel.is_sharded else 1)
        return own + averages, writers | of_averages

    def count_update(self, is_made: bool) -> None:
        """Count an update that was made or left out.

        While float16's loss scale still falls, what is left out tells of nothing but that scale: the first updates of a run
        find it. Only with a scale of 1 or less does a row of them begin.
        """
        self.num_skipped += not is_made
        # A scale on a GPU has to be waited for, and tells nothing where an update was made.
        is_of_scale = not is_made and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        self.skipped_in_row = 0 if is_made or is_of_scale else self.skipped_in_row + 1

    def objective_parameters(self) -> dict[str, nn.Parameter]:
        """Return the numbers that objectives learn, by place and name."""
        modules = {place: objective for place, objective in self.objectives.items() if isinstance(objective, nn.Module)}
        return {f"{place}.{name}": p for place, module in modules.items() for name, p in module.named_parameters()}

    def values(self) -> dict[str, Any]:
        """Return what JSON can hold: all but the tensors of the encoder."""
        moments = moments_of(self.loss_optimizer, self.temperature.log_scale)
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "num_updates": self.parallel.num_updates,
            "num_averaged": self.average.num_updates,
            "early_stop": self.early_stop.state_dict(),
            "roll_back": self.roll_back.state_dict(),
            "scaler": self.scaler.state_dict(),
            "budget": None if self.budget is None else asdict(self.budget),
            # Python's floats hold a float32 exactly.
            "temperature": {
                "log_scale": self.temperature.log_scale.item(),
                **{name: moments[name].item() for name in ("step", *MOMENTS)},
            },
            "objectives": {
                name: {"value": parameter.tolist()}
                | {key: moments_of(self.loss_optimizer, parameter)[key].tolist() for key in ("step", *MOMENTS)}
                for name, parameter in self.objective_parameters().items()
            },
        }

    def load(self, values: dict[str, Any]) -> None:
        """Take over what `values()` returned."""
        for name in COUNTERS:
            setattr(self, name, values.get(name, getattr(self, name)))  # older checkpoints have fewer
        budget = values.get("budget")
        self.budget = None if budget is None else RunBudget(**budget)
        self.parallel.num_updates = values["num_updates"]
        self.average.num_updates = values["num_averaged"]
        self.early_stop.load_state_dict(values["early_stop"])
        self.roll_back.load_state_dict(values["roll_back"])
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        of_temperature = dict(values["temperature"])
        with torch.no_grad():
            self.temperature.log_scale.fill_(of_temperature.pop("log_scale"))
        moments = moments_of(self.loss_optimizer, self.temperature.log_scale)
        for name, value in of_temperature.items():
            moments[name].fill_(value)
        for name, parameter in self.objective_parameters().items():
            kept = dict(values["objectives"][name])
            with torch.no_grad():
                parameter.copy_(torch.tensor(kept.pop("value")))
            for key, value in kept.items():
                moments_of(self.loss_optimizer, parameter)[key].copy_(torch.tensor(value))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop, state saved
    step: int
    evaluations: dict[str, dict[str, float]]  # "untrained", "trained" -> metrics; what was evaluated

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
