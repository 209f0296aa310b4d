"""Chooses the checkpoint whose embeddings of passages a version is mined with: the new one, or an earlier one.

Encoding the corpus is most of a refresh. `frozen` pays for it once, as ADORE does (Zhan et al. 2021, arXiv 2104.08051):
only queries are encoded anew. `drift` looks at a sample first and keeps the earlier embeddings while they have hardly
moved. The choice is written down before a version is published, so that a version that is made again makes the same choice.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mining.state import read_state, write_state
from mining.table.sampling import stream
from trainer.data.shuffle import mix
from trainer.handoff.manifest import PINS, pin

log = logging.getLogger(__name__)

BASES = "bases"  # the entry of the state
HOLDER, PIN_S = "base", 30 * 24 * 3600.0  # renewed by every refresh; a service may be away for that long
SAMPLE_SHARE, MIN_SAMPLE = 0.01, 128  # of the passages, for the drift


@dataclass(frozen=True)
class Base:
    """Where a version's embeddings of passages come from."""

    version: int  # that took them
    weights_digest: str
    checkpoint_step: int
    folder: str | None = None  # below shards/, where they must stay; None: no later version takes them


def earlier_base(run: Path, version: int) -> Base | None:
    """Return the base of the version before, or None."""
    earlier = [base for base in _read(run) if base.version < version]
    return max(earlier, key=lambda base: base.version, default=None)


def keep_base(run: Path, base: Base) -> None:
    """Write the base of a version that will be published, and pin what later ones may take. Rank 0 only."""
    # Those of later versions were written by a run that has been taken back.
    earlier = sorted((b for b in _read(run) if b.version < base.version), key=lambda b: b.version)[-1:]
    write_state(run, BASES, [asdict(b) for b in (*earlier, base)])
    needed = {b.folder for b in (*earlier, base) if b.folder is not None}
    for name in needed:
        pin(run / "shards" / name, HOLDER, PIN_S)
    for pinned in (run / "shards" / PINS).glob(f"*.{HOLDER}"):
        if pinned.name.removesuffix(f".{HOLDER}") not in needed:
            pinned.unlink(missing_ok=True)


def drift_sample(num_passages: int, seed: int) -> np.ndarray:
    """Return the rows of the passages that the drift is measured on, ascending: the same in all refreshes of a run."""
    num_rows = min(num_passages, max(MIN_SAMPLE, round(SAMPLE_SHARE * num_passages)))
    order = np.argsort(mix(stream(seed, 0) + np.arange(num_passages, dtype=np.uint64)), kind="stable")
    return np.sort(order[:num_rows])


def mean_drift(old_nD: np.ndarray, new_nD: np.ndarray) -> float:
    """Return 1 - the mean cosine between the old and the new embeddings of the same passages."""
    norms = np.linalg.norm(old_nD, axis=1) * np.linalg.norm(new_nD, axis=1)
    return float(1 - ((old_nD * new_nD).sum(1) / np.maximum(norms, 1e-12)).mean(dtype=np.float64))


def _read(run: Path) -> list[Base]:
    try:
        return [Base(**fields) for fields in read_state(run, BASES) or []]
    except TypeError:
        return []
