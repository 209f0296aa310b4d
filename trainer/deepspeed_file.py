"""A file of DeepSpeed's own settings, which a job may name: read when the job is, without DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from trainer.errors import InputError

DECIDED = {  # key of DeepSpeed's settings -> ours
    "optimizer": "section optim",
    "scheduler": "optim.schedule",
    "fp16": "precision.encode",
    "bf16": "precision.encode",
    "amp": "precision.encode",
    "torch_autocast": "precision.encode",
    "data_types": "precision.encode",
    "gradient_clipping": "optim.max_grad_norm",
    "gradient_accumulation_steps": "chunk.tokens",
    "train_batch_size": "batch.queries",
    "train_micro_batch_size_per_gpu": "chunk.tokens",
}


def read_deepspeed(path: Path, stage: int) -> dict[str, Any]:
    """Return a file of DeepSpeed's settings; raises InputError for what the job decides."""
    try:
        given = json.loads(path.read_text())
        found_stage = given.get("zero_optimization", {}).get("stage", stage)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"parallel.deepspeed={path} is not a readable JSON file of settings: {error}") from error
    if found_stage != stage:
        raise InputError(
            f'{path} asks for stage {found_stage} of ZeRO; set parallel.backend="zero{found_stage}", or leave it out'
        )
    for key, ours in DECIDED.items():
        if key in given:
            raise InputError(f"{path} sets {key}, which the job decides; remove it there and set {ours}")
    return given
