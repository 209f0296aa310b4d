"""What `negpool status` says of warnings and of the verdict, in folders of any age."""

import json

from rich.text import Text

from launch.status import describe_run, run_status


def run_folder(folder, trainer, miner, results=None):
    (folder / "status").mkdir(parents=True)
    (folder / "job.toml").write_text("")
    for side, said in (("trainer", trainer), ("miner", miner)):
        (folder / "status" / f"{side}.json").write_text(json.dumps(said))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def described(folder):
    return Text.from_markup(describe_run(run_status(folder))).plain.splitlines()


def test_warnings_of_both_sides_stand_below_them_and_the_verdict_comes_last(tmp_path):
    warned = [{"kind": "flat", "sentence": "All [texts] look alike.", "step": 3}]
    trainer = {"phase": "finished", "step": 9, "num_steps": 9, "warnings": warned, "skipped": 1}
    miner = {"phase": "finished", "warnings": [{"kind": "dropped", "sentence": "Most candidates are dropped."}]}
    measured = {name: {"mrr@10": value} for name, value in (("bm25", 0.4), ("untrained", 0.8), ("trained", 0.1), ("last", 0.0))}
    verdict = {"level": "worse", "sentence": "The trained model is worse than the untrained one."}
    lines = described(run_folder(tmp_path / "run", trainer, miner, {**measured, "verdict": verdict}))
    assert lines[1].split() == ["trainer", "finished"] and lines[2].strip() == "All [texts] look alike."
    assert lines[3].strip() == "1 update left out: gradients were not finite"
    assert lines[5].strip() == "Most candidates are dropped."
    assert lines[-2] == "MRR@10   bm25 0.400   untrained 0.800   trained 0.100   last 0.000"
    assert lines[-1] == "The trained model is worse than the untrained one."


def test_a_folder_without_any_of_it_is_told_as_before(tmp_path):
    miner = {"phase": "searching", "checkpoint_step": 4, "version": 2, "done": 3, "total": 9}
    trainer = {"phase": "training", "step": 5, "num_steps": 9, "loss": 0.5, "eta_s": 60, "swaps": [[0, 0]]}
    lines = described(run_folder(tmp_path / "run", trainer, miner))
    assert lines[1:3] == [
        "trainer  step 5/9   loss 0.500   about 1:00 left   negatives v0",
        "miner    searching, checkpoint of step 4   3/9",
    ]
    assert lines[-1].strip() == "next swap: negatives v2, from step 4"
