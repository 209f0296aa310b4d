"""What is kept of a run is what a result says, whether an older or a newer run kept it."""

import json

import pytest

import negpool
from trainer.handoff.manifest import publish_version
from trainer.handoff.weights import checkpoint_name, checkpoints_folder

METRICS = {"ndcg@10": 0.5, "mrr@10": 0.4, "recall@10": 0.6, "recall@100": 0.9}
KEPT = {"versions_swapped": 2, "seconds": 61.5, "num_test_queries": 8}


def write_run(run, **kept):
    """Write what a finished run leaves, with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        publish_version(
            checkpoints_folder(run) / checkpoint_name(step), lambda folder: (folder / "encoder").mkdir(), {"step": step}
        )
    (run / "results.json").write_text(json.dumps(KEPT | kept))
    return run


def test_the_trained_model_is_the_best_one_where_the_run_names_it(tmp_path):
    rows = {name: METRICS for name in ("bm25", "untrained", "trained", "last")}
    warning = {"kind": "dev", "sentence": "Dev fell.", "step": 15}
    verdict = {"level": "better", "sentence": "The model is better.", "warnings": [warning]}
    intervals = {"trained": {"ndcg@10": [0.4, 0.6]}}
    run = write_run(tmp_path / "run", **rows, steps={"trained": 10, "last": 20}, verdict=verdict, intervals=intervals)
    result = negpool.TrainResult.read(run)
    assert result.model_folder == run / "checkpoints" / "step-00000010" / "encoder"
    assert list(result.metrics) == list(rows) and result.intervals == intervals
    assert result.verdict is not None and (result.verdict.level, result.verdict.warnings) == ("better", ("Dev fell.",))
    assert "The model is better." in repr(result) and "The model is better." in result._repr_html_()


def test_a_run_without_verdict_and_test_queries_has_its_newest_model(tmp_path):
    result = negpool.TrainResult.read(write_run(tmp_path / "run"))
    assert result.model_folder.parent.name == "step-00000020"
    assert (result.metrics, result.intervals, result.verdict) == ({}, {}, None)
    assert repr(result).replace("\n", "") == f"The model: {result.model_folder}"


def test_a_run_that_has_not_finished_has_no_result(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(negpool.InputError, match="expected the folder of a run that has finished"):
        negpool.TrainResult.read(tmp_path)
