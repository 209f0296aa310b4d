"""Run folders as a run leaves them, written in milliseconds: logs, status, evaluations, results."""

import json
from pathlib import Path
from typing import Any

from launch.jobfile import read_job, write_job
from trainer.data.datasets import open_data

MEASURES = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
BETTER = {"level": "better", "sentence": "The trained model is better than the untrained one.", "warnings": []}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def step(number: int, loss: float, **values: Any) -> dict[str, Any]:
    times = {f"time/{part}_s": 0.1 for part in ("encode", "loss", "backward", "data")} | {"time/step_s": 0.5}
    figures = {"tokens_per_rank_per_s": 100.0, "memory/peak_gib": 1.0, "grad_norm": 2.0 / number}
    return {"step": number, "loss": loss, **figures, **times, **values}


def dev(number: int, value: float) -> dict[str, Any]:
    return {"step": number, **{f"dev/{name}": value for name in MEASURES}}


def published(version: int, source: str = "model", **audit: Any) -> dict[str, Any]:
    quantiles = {"q05": 0.1, "q50": 0.2, "q95": 0.3}
    audit = {"recall": 1.0, "scores": quantiles, "positive_scores": {"q05": 0.5, "q50": 0.6, "q95": 0.7}} | audit
    told = {"dropped": {"equal_texts": 3}, "seconds": {"encoding": 2.0}}
    return {"step": 0, "event": "published", "version": version, "source": source, "audit": audit, **told}


def row(value: float) -> dict[str, float]:
    return dict.fromkeys(MEASURES, value)


def write_run(run: Path, data: Path, overrides: list[str] | None = None, **results: Any) -> Path:
    """Write a finished run of ten steps that was evaluated on dev; results: more keys of results.json."""
    given = [f"run.folder={run}", f"data.path={data}", f"data.cache={data.parent / 'cache'}", *(overrides or [])]
    write_job(run / "job.toml", read_job(None, [*given, "model.name=tiny", "optim.steps=10", "negatives.per_query=1"]))
    lines = [step(number, 1 / number) for number in range(1, 11)] + [dev(4, 0.4), dev(8, 0.5)]
    write_lines(run / "logs" / "metrics.jsonl", [*lines, {"step": 2, "event": "negatives swapped", "negatives/version": 1}])
    write_lines(run / "logs" / "miner.jsonl", [published(0, "bm25"), published(1), published(2)])
    status = {"phase": "finished", "step": 10, "num_steps": 10, "heartbeat": 0.0}
    write_json(run / "status" / "trainer.json", status)
    found = {"bm25": row(0.3), "untrained": row(0.45), "trained": row(0.6), "num_test_queries": 8, "seconds": 65.0, **results}
    write_json(run / "results.json", {name: value for name, value in found.items() if value is not None})
    digest = open_data(read_job(run / "job.toml", []).train.data, {}).digest
    write_json(run / "checkpoints" / "step-00000010" / "manifest.json", {"data_digest": digest, "files": {}, "step": 10})
    return run


def write_each(run: Path, **reciprocal: list[float]) -> None:
    """Write what evaluations keep of each query: the reciprocal place as every measure, so 0 is not found at all."""
    for name, values in reciprocal.items():
        each = {measure: values for measure in MEASURES}
        write_json(run / "evaluations" / f"{name}.json", {"step": 10, "split": "test", **row(0.5), "each": each})
