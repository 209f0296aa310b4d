"""AdamW with decay groups, linear warm-up and linear decay."""

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

from gradcache import Temperature
from trainer.job import OptimSettings


def build_optimizer(
    encoder: nn.Module, temperature: Temperature, settings: OptimSettings, num_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Return the optimizer of the encoder and the temperature, and its schedule over `num_steps`."""
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    groups = [
        # Biases and norms are the vectors among the parameters; pulling them to zero only hurts.
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {
            "params": [p for p in temperature.parameters() if p.requires_grad],
            "weight_decay": 0.0,
            "lr": settings.temperature_lr,
        },
    ]
    optimizer = AdamW([g for g in groups if g["params"]], lr=settings.lr, fused=True)
    warmup = round(settings.warmup_share * num_steps)
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, num_steps)
