"""Answers as `launch.bench.scaling.worker` does, without a step: what is made of trials is tested apart from them.

A file in NEGPOOL_TEST_TRIALS gets a line for each start; a start of as many ranks as NEGPOOL_TEST_SLOW says never ends by itself,
and one of NEGPOOL_TEST_DEAD ranks dies.
"""

import os
import time
from pathlib import Path

from launch.step_phases import HIDDEN, PHASES


def found(ranks: int, queries: int, step_s: float, **more) -> dict:
    """Return what rank 0 reports of a trial whose steps take so long."""
    phases = {name: {"mean_s": step_s / len(PHASES), "max_s": step_s / 11} for name in PHASES}
    phases |= {"idle": {"mean_s": step_s / 12, "max_s": step_s / 6}, "rest": {"mean_s": step_s / 12, "max_s": step_s / 12}}
    phases |= {HIDDEN: {"mean_s": step_s / 4, "max_s": step_s / 3}}
    bus = [("all_gather", 2**18), ("reduce_scatter", 2**18), ("all_reduce", 90 * 2**20)] if ranks > 1 else []
    sent = 10**6 * 2 * (ranks - 1) // ranks
    return {
        "ranks": ranks,
        "nodes": 1,
        "queries": queries,
        "queries_per_rank": queries // ranks,
        "passages_per_query": 2,
        "backend": "ddp",
        "precision": "fp32",
        "travels": "queries",
        "negatives": "drawn at random",
        "tokens": queries * 100,
        "flops": queries * 10**9,
        "matmul_flops_per_s": 1e11,
        "step_s": [step_s * 0.9, step_s, step_s * 1.2],
        "phases": phases,
        "bytes": {"counted": sent, "formula": sent, "interface": {"name": "lo", "sent": round(sent * 1.02)}},
        "bus": [{"collective": c, "num_bytes": n, "median_s": n / 2e9, "bytes_per_s": 2e9 * n / (n + 2**20)} for c, n in bus],
        "ranks_measured": [
            {"rank": r, "host": "n1", "busy_s": step_s * (1 - r / 100), "idle_s": 0.0, "peak_gib": 1.5 + r} for r in range(ranks)
        ],
        "slowest_host": "n1",
        "device": "a processor",
        "threads": 1,
        "torch": "2.0",
        "commit": "0123456789abcdef",
        "is_modified": False,
        **more,
    }


def stand_in(job, overrides, data, queries, warm_up, steps, threads, pin) -> dict | None:
    """Return a trial on as many ranks as were started, on the hardware and the code that are there."""
    from launch.versions import code_version, library_version

    if os.environ.get("RANK", "0") != "0":
        return None
    assert Path(job).read_text() and overrides == [] and pin is True and data == "job"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with open(os.environ["NEGPOOL_TEST_TRIALS"], "a") as file:
        file.write(f"{ranks} {queries}\n")
    while os.environ.get("NEGPOOL_TEST_SLOW") == str(ranks):
        time.sleep(0.1)
    if os.environ.get("NEGPOOL_TEST_DEAD") == str(ranks):
        raise SystemExit("[rank0]: this size dies")  # as torch writes a rank's last words
    commit, is_modified = code_version()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    device = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    here = {"device": device, "torch": library_version("torch"), "threads": threads}
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return found(ranks, queries, queries / ranks / 100, **here, commit=commit, is_modified=is_modified, nodes=nodes)


if __name__ == "__main__":
    from launch.ranks import answer

    answer(stand_in)
