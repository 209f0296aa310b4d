"""Reports on a data set before training: its statistics, and every problem with file and line."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from trainer.data.build import build_source
from trainer.data.forms import NO_COLUMNS, find_source
from trainer.data.judged import SIDES
from trainer.data.problems import Problem, has_rows
from trainer.data.split import say_missing
from trainer.data.texts import batches, first_of_equal

SHOWN = 10  # problems of one kind that are printed


@dataclass(frozen=True)
class DataReport:
    """The statistics by table, and what is wrong, in the order of files and lines."""

    statistics: dict[str, dict[str, Any]]
    problems: list[Problem]  # blemishes among them
    advice: list[str] = field(default_factory=list)  # sentences on what is neither, such as a split that is missing

    @property
    def refused(self) -> list[Problem]:
        """What a person must mend."""
        return [problem for problem in self.problems if not problem.is_blemish]

    @property
    def blemishes(self) -> list[Problem]:
        """What is left out or read otherwise, unless data.strict refuses it, too."""
        return [problem for problem in self.problems if problem.is_blemish]

    def as_json(self) -> dict[str, Any]:
        return {
            "statistics": self.statistics,
            "problems": [_as_json(problem) for problem in self.refused],
            "blemishes": [_as_json(blemish) for blemish in self.blemishes],
            "advice": self.advice,
        }

    def as_text(self) -> str:
        """Return one line a table, then the blemishes and the problems, at most SHOWN of a kind."""
        lines = [
            f"{name:<12}" + "  ".join(f"{key} {value}" for key, value in values.items())
            for name, values in self.statistics.items()
        ]
        lines += [*_shown(self.blemishes), *_shown(self.refused), *self.advice]
        if self.blemishes:
            number = f"{len(self.blemishes)} blemish" + "es" * (len(self.blemishes) > 1)
            lines.append(f"{number}, which training lives with; data.strict=true refuses blemishes")
        lines.append("no problems" if not self.refused else f"{len(self.refused)} problem" + "s" * (len(self.refused) > 1))
        return "\n".join(lines)


def _as_json(problem: Problem) -> dict[str, Any]:
    where = "row" if has_rows(problem.file) else "line"
    return {"file": str(problem.file), where: problem.number, "kind": problem.kind, "problem": problem.sentence}


def _shown(problems: list[Problem]) -> list[str]:
    """Return the lines that say what is wrong, at most SHOWN of a kind, and how many more there are."""
    kinds = Counter(problem.kind for problem in problems)
    shown: Counter[str] = Counter()
    lines = []
    for problem in problems:
        shown[problem.kind] += 1
        if shown[problem.kind] <= SHOWN:
            lines.append(str(problem))
    return lines + [f"… and {n - SHOWN} more: {kind}" for kind, n in kinds.items() if n > SHOWN]


def check_dataset(path: Path, columns: Mapping[str, str] = NO_COLUMNS, train_split: str = "train") -> DataReport:
    """Return the report on a data set of any form; raises InputError if there is none. columns: as data.columns."""
    source = find_source(path, columns)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory(prefix="negpool-check-") as name:
        folder = Path(name)
        build_source(source, folder, problems.append)
        statistics = {side: _text_statistics(folder, side) for side in SIDES}
        of_splits = _split_statistics(folder)
        statistics |= of_splits
        if (folder / "given-ids.npy").exists():
            scores = np.load(folder / "given-scores.npy")
            statistics["negatives"] = {"given": len(scores), "with_teacher_score": int(np.isfinite(scores).sum())}
    splits = {name.removeprefix("qrels-") for name in of_splits}
    return DataReport(statistics, problems, say_missing(splits, path, columns, train_split))


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
        absent = folder / file.name.replace("qrels-", "absent-", 1)
        num_scored = int(np.isfinite(positives["teacher"]).sum())
        found[file.stem] = {
            "queries": len(queries),
            "positives": len(positives),
            "most_of_a_query": int(counts.max(initial=0)),
            **({"with_teacher_score": num_scored} if num_scored else {}),
            **({"of_absent_documents": len(np.load(absent))} if absent.exists() else {}),
            **({"shares_queries_with": ", ".join(shared)} if shared else {}),
        }
        earlier[file.stem] = queries
    return found
