"""What a person should know of a data set before training on it: its statistics, and every problem with file and line."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.beir import Problem, read_judgements, read_texts
from trainer.data.datasets import SIDES, dataset_files, duplicate_id, judgement_problems

SHOWN = 10  # problems of one kind that are printed


@dataclass(frozen=True)
class DataReport:
    """The statistics by file, and all problems in the order of files and lines."""

    statistics: dict[str, dict[str, Any]]
    problems: list[Problem]

    def as_json(self) -> dict[str, Any]:
        problems = [{"file": str(p.file), "line": p.line, "kind": p.kind, "problem": p.sentence} for p in self.problems]
        return {"statistics": self.statistics, "problems": problems}

    def as_text(self) -> str:
        """Return one line a file, then the problems, at most SHOWN of a kind."""
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


def check_dataset(path: Path) -> DataReport:
    """Return the report on a folder in BEIR's form; raises InputError if it is no such folder."""
    problems: list[Problem] = []
    statistics: dict[str, dict[str, Any]] = {}
    files = dataset_files(path)
    ids: dict[str, pa.ChunkedArray] = {}
    for side in SIDES:
        statistics[side], ids[side] = _check_texts(files[side], problems)
    test_queries: dict[str, set[str]] = {}
    for name, file in files.items():
        if name in SIDES:
            continue
        judgements = list(read_judgements(file, problems.append))
        problems += judgement_problems(file, judgements, ids)
        test_queries[name] = {j.query for j in judgements if j.score > 0}
        positives = Counter(j.query for j in judgements if j.score > 0)
        earlier = [other for other in test_queries if other != name and test_queries[other] & test_queries[name]]
        statistics[name] = {
            "queries": len(positives),
            "positives": sum(positives.values()),
            "most_of_a_query": max(positives.values(), default=0),
            **({"shares_queries_with": ", ".join(earlier)} if earlier else {}),
        }
    return DataReport(statistics, problems)


def _check_texts(file: Path, problems: list[Problem]) -> tuple[dict[str, Any], pa.ChunkedArray]:
    first_line: dict[str, int] = {}
    lengths, texts = [], Counter[int]()
    for number, row_id, text in read_texts(file, problems.append):
        if (earlier := first_line.setdefault(row_id, number)) != number:
            problems.append(duplicate_id(file, number, row_id, earlier))
        lengths.append(len(text))
        texts[hash(text)] += 1
    if not lengths:
        problems.append(Problem(file, 0, "empty", "this file has no sound line; expected at least one text"))
    quantiles = np.quantile(lengths, [0.5, 0.95, 1]).astype(int).tolist() if lengths else [0, 0, 0]
    statistics = {
        "texts": len(lengths),
        "repeated": sum(count - 1 for count in texts.values()),
        "characters_median": quantiles[0],
        "characters_95%": quantiles[1],
        "characters_most": quantiles[2],
    }
    return statistics, pa.chunked_array([pa.array(list(first_line), pa.string())])
