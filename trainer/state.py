"""Everything of a training run that must survive a restart, beside weights and moments: a few numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import AdamW

from gradcache import Temperature
from trainer.optim import moments_of
from trainer.parallel import MOMENTS, Parallel

COUNTERS = ("step", "negatives_version", "swaps", "seconds")


@dataclass
class TrainState:
    """The moving parts of a run. The order of data and the learning rate need no more than `step`."""

    parallel: Parallel  # the encoder and its optimizer
    temperature: Temperature
    temperature_optimizer: AdamW  # its learning rate is 0 where the temperature is fixed
    scaler: torch.amp.GradScaler  # of float16 gradients
    step: int = 0  # steps done
    negatives_version: int | None = None  # in force after `step`
    swaps: list[list[int]] = field(default_factory=list)  # [step, version] of every swap so far
    seconds: float = 0.0  # spent in steps, over all starts

    def values(self) -> dict[str, Any]:
        """Return what JSON can hold: all but the tensors of the encoder."""
        moments = moments_of(self.temperature_optimizer, self.temperature.log_scale)
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "num_updates": self.parallel.num_updates,
            "scaler": self.scaler.state_dict(),
            # Python's floats hold a float32 exactly.
            "temperature": {
                "log_scale": self.temperature.log_scale.item(),
                **{name: moments[name].item() for name in ("step", *MOMENTS)},
            },
        }

    def load(self, values: dict[str, Any]) -> None:
        """Take over what `values()` returned."""
        for name in COUNTERS:
            setattr(self, name, values[name])
        self.parallel.num_updates = values["num_updates"]
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        kept = dict(values["temperature"])
        with torch.no_grad():
            self.temperature.log_scale.fill_(kept.pop("log_scale"))
        moments = moments_of(self.temperature_optimizer, self.temperature.log_scale)
        for name, value in kept.items():
            moments[name].fill_(value)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop, state saved
    step: int
    evaluations: dict[str, dict[str, float]]  # "untrained", "trained" -> metrics; what was evaluated

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
