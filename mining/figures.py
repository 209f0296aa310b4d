"""The figures of a miner at work: the same names in its status file, its JSON lines, `negpool status` and Prometheus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.metrics import read_status

RATES = {
    "tokens_per_s": "encoded by all ranks; while at it, as if all were as fast as rank 0",
    "queries_per_s": "searched, filtered and sampled by all ranks",
}
STEPS = {
    "checkpoint_age_steps": "trainer's steps since the checkpoint at work, or mined last",
    "negatives_age_steps": "trainer's steps since the checkpoint that the newest negatives were mined from",
}
FILTERED = "candidates of the newest version dropped, by filter"


def ages(run: Path, miner: Mapping[str, Any]) -> dict[str, int]:
    """Return how far the trainer is past the checkpoint at work and past the newest negatives; left out where unknown.

    miner: its status. Negatives from BM25 have no age.
    """
    step = read_status(run, "trainer").get("step")
    since = {"checkpoint_age_steps": miner.get("checkpoint_step"), "negatives_age_steps": miner.get("negatives_step")}
    return {} if step is None else {name: max(0, step - other) for name, other in since.items() if other is not None}


def version_figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is told of the newest version."""
    return {
        "negatives_version": manifest["version"],
        "negatives_step": manifest.get("checkpoint_step"),
        "recall": manifest.get("audit", {}).get("recall"),
        "dropped": manifest.get("filter", {}).get("dropped", {}),
    }
