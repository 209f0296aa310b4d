"""AdamW with decay groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.job import OptimSettings


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> Optimizer:
    """Return the optimizer of the trained ones among an encoder's parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        # Biases and norms are the vectors among the parameters; pulling them to zero only hurts.
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=settings.lr, fused=True)


def build_schedule(settings: OptimSettings, num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at a step, counted from 0. Nothing of it must survive a restart.

    As transformers has it, whose own function brings peft and what peft brings: a second of imports at every start.
    """
    warmup = round(settings.warmup_share * num_steps)
    fall, rest = FALLS[settings.schedule], num_steps - warmup

    def factor(step: int) -> float:
        return step / warmup if step < warmup else max(0.0, fall(step - warmup, max(1, rest)))

    return factor


# The factor of a step behind the warm-up, of so many.
FALLS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, num_steps: (num_steps - step) / num_steps,
    "cosine": lambda step, num_steps: 0.5 * (1.0 + math.cos(math.pi * (step / num_steps))),
    "constant_with_warmup": lambda step, num_steps: 1.0,
}


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments_of(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return AdamW's state of a parameter, zeros before its first step: views, so what is copied in takes effect."""
    state = optimizer.state[parameter]
    if not state:
        device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
