"""`negpool bench gpu`: all that this project promises of a GPU, in under eight minutes, on made texts and random weights.

The most important lines come first; what there is no time for is left out with a word, and so is what fails. The file of the
report, if one is asked for, is written behind each line.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from launch.bench import gpu_encoder, gpu_job, gpu_loss, gpu_mining
from launch.bench.lines import Line, measure_lines
from launch.bench.machine import describe
from launch.bench.sizes import Sizes
from launch.output import messages
from trainer.errors import InputError
from trainer.handoff.manifest import write_atomically

BUDGET_S = 450.0
LINES = [
    Line("ceilings of the machine", gpu_encoder.ceilings, limit_s=30),
    Line("encoder, forward and backward", gpu_encoder.encoder, limit_s=180, needs_s=30),
    Line("loss of a square", gpu_loss.loss, limit_s=45),
    Line("small job", gpu_job.job, limit_s=120, needs_s=30),
    Line("cached step against sentence-transformers", gpu_encoder.step, limit_s=150, needs_s=40),
    Line("exact search", gpu_mining.search, limit_s=45),
    Line("whole refresh", gpu_mining.refresh, limit_s=150, needs_s=60),
    Line("loss against a large pool", gpu_loss.pool, limit_s=45),
    Line("cached step of a small model", gpu_encoder.small_step, limit_s=90, needs_s=30),
    Line("index on a GPU", gpu_mining.index, limit_s=90, needs_s=30),
]


def bench_gpu(rounds: int, out: Path | None) -> dict[str, Any]:
    """Return the rows of all lines, found and wanted. Raises InputError on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise InputError("negpool bench gpu needs an NVIDIA GPU, and torch sees none here; negpool doctor says why")
    return measure(LINES, Sizes(rounds=rounds), BUDGET_S, out)


def measure(lines: list[Line], sizes: Sizes, budget_s: float, out: Path | None) -> dict[str, Any]:
    """Return what bench_gpu does, of any lines."""
    started = time.monotonic()

    def on_line(what: str, rows: list[dict[str, Any]]) -> None:
        left_s = budget_s - (time.monotonic() - started)
        messages().print(f"[dim]{what}: {rows[-1]['line_s']:.0f} s; {left_s:.0f} s are left[/dim]")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "gpu.json", json.dumps({"rows": rows}, indent=2) + "\n")

    rows = measure_lines(lines, (sizes,), budget_s, on_line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = round(time.monotonic() - started, 1)
    return {**describe(device), "precision": sizes.precision, "rounds": sizes.rounds, "seconds": seconds, "rows": rows}
