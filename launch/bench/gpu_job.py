"""The line of `negpool bench gpu` about a small job: a real `negpool train` in a process of its own, with the defaults of a job.

Data and model are made before its clock begins; tokenising, the evaluation of the untrained model, and compilation are within.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.bench.gpu_encoder import STEP_DATA
from launch.bench.lines import LeftOut, Row
from launch.bench.made_texts import data_of
from launch.bench.shapes import model_of
from launch.bench.sizes import Sizes
from launch.local import die_with_parent

WANTED_START_S, WANTED_M_TOKENS_PER_S = 15.0, 2.0
POLL_S = 0.1
STOP_S = 10.0  # for the job to end when it is told to
JOB = """
[run]
folder = {folder}
trackers = []
[data]
path = {data}
cache = {cache}
[model]
name = {model}
max_query_tokens = {tokens}
max_passage_tokens = {tokens}
[batch]
queries = {queries}
[optim]
steps = {steps}
[negatives]
per_query = 0
[checkpoint]
every_steps = {steps}
[profile]
steps = {profiled}
"""
BUSY = "profile/gpu_busy_share"  # of a record of the metrics


def job(sizes: Sizes) -> list[Row]:
    """Measure the time until step 1, and the tokens per second of the steps in the second half."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # With a cache of its own nothing is tokenised before.
        words: dict[str, Any] = {"folder": f"{folder}/run", "cache": f"{folder}/cache"}
        words |= {"data": str(data_of(STEP_DATA, num_pairs=sizes.num_pairs)), "model": model_of(sizes.small_model)}
        words |= {"queries": sizes.job_queries, "steps": sizes.job_steps, "tokens": sizes.max_tokens}
        words["profiled"] = f"{sizes.job_steps // 4 + 1}:{sizes.job_steps // 4 + 4}"  # before the half whose time counts
        (folder / "job.toml").write_text(JOB.format(**{key: json.dumps(value) for key, value in words.items()}))
        begun = time.time()
        records = _run(folder, sizes)
    steps = [record for record in records if "loss" in record]
    rates = [step["tokens_per_rank_per_s"] for step in steps[len(steps) // 2 :]]
    what = f"{sizes.small_model}, job"
    word = "" if len(steps) == sizes.job_steps else f"{len(steps)} of {sizes.job_steps} steps in time"
    start_s, per_s = steps[0]["time"] - begun, statistics.median(rates)
    busy = [record[BUSY] for record in records if BUSY in record]
    return [
        Row(f"{what}, start to step 1", round(start_s, 1), "s", WANTED_START_S, less_is_better=True),
        Row(
            f"{what}, step of {sizes.job_queries} queries", round(per_s / 1e6, 6), "M tokens/s", WANTED_M_TOKENS_PER_S, word=word
        ),
        *(Row(what, share, "of the time the GPU is busy") for share in busy),
    ]


def _run(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Return the records of a job: with all its steps, or with as many as there is time for."""
    command = [sys.executable, "-m", "negpool", "train", str(folder / "job.toml")]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    deadline = time.monotonic() + sizes.job_s
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent)
        try:
            while not _is_through(folder, sizes) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            process.kill()
            process.wait()
    records = _records(folder)
    if not any("loss" in record for record in records):
        said = (folder / "log").read_text().strip().splitlines()
        raise LeftOut(f"no step in {sizes.job_s:.0f} s; its last words: {said[-1] if said else 'none'}")
    return records


def _is_through(folder: Path, sizes: Sizes) -> bool:
    return any(record["step"] == sizes.job_steps and "loss" in record for record in _records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "logs" / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # behind the last newline, what is still being written
    return [json.loads(line) for line in lines]
