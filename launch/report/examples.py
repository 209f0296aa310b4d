"""Some training queries with their positives and the negatives mined for them, for a person to judge."""

from pathlib import Path
from typing import Any

import numpy as np

from launch.jobfile import read_job
from mining.export import mined_row
from mining.offline import read_mined
from trainer.data.row import Entry, Row

NUM_QUERIES, NUM_NEGATIVES, NUM_LINES = 10, 4, 6


def read_examples(run: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the newest version and queries spread evenly over it; raises InputError if there is nothing to show, saying why."""
    mined = read_mined(read_job(run / "job.toml", [f"run.folder={run}"]).mine)
    have = np.flatnonzero(np.diff(mined.negatives.indptr))
    places = have[np.linspace(0, len(have) - 1, min(NUM_QUERIES, len(have))).astype(np.int64)].tolist()
    rows = [mined_row(mined.data, mined.judgements, mined.negatives, place) for place in places]
    return mined.negatives.version, [_example(row) for row in rows]


def _example(row: Row) -> dict[str, Any]:
    order = sorted(range(len(row.negatives)), key=lambda place: -row.scores[place])[:NUM_NEGATIVES]
    return {
        "query": row.query.text,
        "positives": [{"text": _excerpt(text)} for text in row.positives],
        "negatives": [{"text": _excerpt(row.negatives[place]), "score": row.scores[place]} for place in order],
    }


def _excerpt(text: Entry) -> str:
    lines = text.text.splitlines()
    return "\n".join(lines[:NUM_LINES]) + ("\n…" if len(lines) > NUM_LINES else "")
