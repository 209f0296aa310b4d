"""What a person should know of a data set before training on it: its statistics, and every problem with file and line."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from trainer.data.build import build_source
from trainer.data.forms import NO_COLUMNS, find_source
from trainer.data.judged import SIDES
from trainer.data.problems import Problem, has_rows
from trainer.data.texts import batches, first_of_equal

SHOWN = 10  # problems of one kind that are printed


@dataclass(frozen=True)
class DataReport:
    """The statistics by table, and all problems in the order of files and lines."""

    statistics: dict[str, dict[str, Any]]
    problems: list[Problem]

    def as_json(self) -> dict[str, Any]:
        problems = [
            {"file": str(p.file), "row" if has_rows(p.file) else "line": p.number, "kind": p.kind, "problem": p.sentence}
            for p in self.problems
        ]
        return {"statistics": self.statistics, "problems": problems}

    def as_text(self) -> str:
        """Return one line a table, then the problems, at most SHOWN of a kind."""
        lines = [
            f"{name:<12}" + "  ".join(f"{key} {value}" for key, value in values.items())
            for name, values in self.statistics.items()
        ]
        kinds = Counter(problem.kind for problem in self.problems)
        shown: Counter[str] = Counter()
        for problem in self.problems:
            shown[problem.kind] += 1
            if shown[problem.kind] <= SHOWN:
                lines.append(str(problem))
        lines += [f"… and {n - SHOWN} more: {kind}" for kind, n in kinds.items() if n > SHOWN]
        lines.append("no problems" if not self.problems else f"{len(self.problems)} problems")
        return "\n".join(lines)


def check_dataset(path: Path, columns: Mapping[str, str] = NO_COLUMNS) -> DataReport:
    """Return the report on a data set of any form; raises InputError if there is none. columns: as data.columns."""
    source = find_source(path, columns)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="negpool-check-") as name:
        folder = Path(name)
        build_source(source, folder, problems.append)
        statistics = {side: _text_statistics(folder, side) for side in SIDES}
        statistics |= _split_statistics(folder)
        if (folder / "given-ids.npy").exists():
            scores = np.load(folder / "given-scores.npy")
            statistics["negatives"] = {"given": len(scores), "with_teacher_score": int(np.isfinite(scores).sum())}
    return DataReport(statistics, problems)


def _text_statistics(folder: Path, side: str) -> dict[str, Any]:
    keys = np.load(folder / f"{side}-keys.npy")[1]
    lengths = [pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False) for batch in batches(folder / f"{side}.arrow")]
    quantiles = np.quantile(np.concatenate(lengths), [0.5, 0.95, 1]).astype(int).tolist() if len(keys) else [0, 0, 0]
    return {
        "texts": len(keys),
        "repeated": int((first_of_equal(keys) != np.arange(len(keys))).sum()),
        "characters_median": quantiles[0],
        "characters_95%": quantiles[1],
        "characters_most": quantiles[2],
    }


def _split_statistics(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    earlier: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("qrels-*.npy")):
        rows = np.load(file)
        positives = rows[rows["score"] > 0]
        queries, counts = np.unique(positives["query"], return_counts=True)
        shared = [name for name, others in earlier.items() if np.isin(queries, others).any()]
        num_scored = int(np.isfinite(positives["teacher"]).sum())
        found[file.stem] = {
            "queries": len(queries),
            "positives": len(positives),
            "most_of_a_query": int(counts.max(initial=0)),
            **({"with_teacher_score": num_scored} if num_scored else {}),
            **({"shares_queries_with": ", ".join(shared)} if shared else {}),
        }
        earlier[file.stem] = queries
    return found
