"""Some training queries with their positives and the negatives mined for them, for a person to judge."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from trainer.data.datasets import RetrievalData, open_data
from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, versions
from trainer.handoff.negatives import Negatives, negatives_folder, open_negatives
from trainer.handoff.settings import DataSettings, Sources

NUM_QUERIES, NUM_NEGATIVES, NUM_LINES = 10, 4, 6


def read_examples(run: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the newest version and queries spread evenly over it; raises InputError if there is nothing to show, saying why."""
    job = tomllib.loads((run / "job.toml").read_text())
    settings = pydantic.TypeAdapter(DataSettings).validate_python(job["data"])
    data = open_data(settings, pydantic.TypeAdapter(Sources).validate_python(job["sources"]))
    rows = data.training_queries(settings.train_split)
    for folder in reversed(versions(negatives_folder(run))):
        try:
            negatives = open_negatives(run, folder.name, len(rows), len(data.corpus))
        except TornVersion:
            continue
        return negatives.version, _spread(data, settings.train_split, rows, negatives)
    raise InputError("No negatives have been published that fit the data.")


def _spread(data: RetrievalData, split: str, rows: np.ndarray, negatives: Negatives) -> list[dict[str, Any]]:
    have = np.flatnonzero(np.diff(negatives.indptr))
    places = have[np.linspace(0, len(have) - 1, min(NUM_QUERIES, len(have))).astype(np.int64)]
    indptr, ids = data.positives(rows[places], split)
    return [
        {
            "query": data.queries[int(rows[place])]["text"],
            "positives": [{"text": _excerpt(data, row)} for row in ids[indptr[i] : indptr[i + 1]]],
            "negatives": _negatives(data, negatives, place),
        }
        for i, place in enumerate(places)
    ]


def _negatives(data: RetrievalData, negatives: Negatives, place: int) -> list[dict[str, Any]]:
    here = slice(int(negatives.indptr[place]), int(negatives.indptr[place + 1]))
    pairs = zip(negatives.ids[here][:NUM_NEGATIVES], negatives.scores[here], strict=False)
    return [{"text": _excerpt(data, row), "score": float(score)} for row, score in pairs]


def _excerpt(data: RetrievalData, row: int) -> str:
    lines = data.corpus[int(row)]["text"].splitlines()
    return "\n".join(lines[:NUM_LINES]) + ("\n…" if len(lines) > NUM_LINES else "")
