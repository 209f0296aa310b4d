"""Everything of a training run that must survive a restart, beside the weights."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradcache import Temperature
from trainer.encoder.model import Encoder


@dataclass
class TrainState:
    """The moving parts of a run. The order of data needs no more than `step`."""

    encoder: Encoder  # the bare encoder: the same object that DDP wraps
    temperature: Temperature
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler  # of float16 gradients
    step: int = 0  # steps done
    negatives_version: int | None = None  # in force after `step`
    swaps: list[list[int]] = field(default_factory=list)  # [step, version] of every swap so far
    seconds: float = 0.0  # spent in steps, over all starts

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of optimizer and temperature under flat names, for safetensors."""
        found = {f"temperature.{name}": tensor for name, tensor in self.temperature.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def values(self) -> dict[str, Any]:
        """Return the JSON part: counters, the schedule, the optimizer's groups."""
        counters = {k: getattr(self, k) for k in ("step", "negatives_version", "swaps", "seconds")}
        return {
            **counters,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "groups": self.optimizer.state_dict()["param_groups"],
        }

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `tensors()` and `values()` returned; the encoder's weights are loaded with its folder."""
        self.temperature.load_state_dict(_below(tensors, "temperature."))
        per_parameter: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            per_parameter.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": per_parameter, "param_groups": values["groups"]})
        self.schedule.load_state_dict(values["schedule"])
        if values.get("scaler"):
            self.scaler.load_state_dict(values["scaler"])
        for key in ("step", "negatives_version", "swaps", "seconds"):
            setattr(self, key, values[key])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop, state saved
    step: int
    evaluations: dict[str, dict[str, float]]  # "untrained", "trained" -> metrics; what was evaluated

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
