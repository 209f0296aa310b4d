"""What an idle miner costs a trainer: the same step beside a service that waits for a checkpoint, and beside none.

The service is a real one, two MPI ranks on a run folder where no checkpoint ever appears. For the turns without one it is
stopped (SIGSTOP): a stopped process takes no core, and nothing else differs between the turns.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from launch.bench.machine import seconds_of
from launch.bench.step import StepBench
from launch.local import mpi_command
from trainer.metrics import read_status
from trainer.world import join_world

MINER_RANKS, START_S = 2, 120.0
PAIRS, MAX_TOKENS, TURNS = 32, 64, 4  # of a step; turns of each in a round, for a difference of one part in a hundred
JOB = """
[run]
folder = "{folder}/run"
trackers = []
[data]
path = "{data}"
[mine]
bm25_top_k = 0
"""


def measure_idle(data: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return how many times longer a step takes while a miner waits, the median of pairs of turns."""
    world = join_world()
    try:
        bench = StepBench(world, data, model, PAIRS, MAX_TOKENS)
        bench.ours(bench.pairs, PAIRS, "all")
        seconds: dict[int, list[float]] = {signal.SIGSTOP: [], signal.SIGCONT: []}
        with _idle_service(data) as service:
            for number in range(TURNS * rounds):
                for state in sorted(seconds, reverse=number % 2 == 0):  # each of them first as often as second
                    for process in service:
                        process.send_signal(state)
                    bench.free_gradients()
                    seconds[state].append(seconds_of(lambda: bench.ours(bench.pairs, PAIRS, "all"), world.device))
        stopped, idle = seconds[signal.SIGSTOP], seconds[signal.SIGCONT]
        ratio = statistics.median(a / b for a, b in zip(idle, stopped, strict=True))
        return {"miner_ranks": MINER_RANKS, "seconds": round(statistics.median(idle), 3), "ratio": round(ratio, 4)}
    finally:
        world.leave()


@contextlib.contextmanager
def _idle_service(data: Path) -> Iterator[list[psutil.Process]]:
    """Start a service, wait until it waits, and yield its processes, the launcher's too."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        job = Path(folder) / "job.toml"
        job.write_text(JOB.format(folder=folder, data=data.resolve()))
        command = [*mpi_command(MINER_RANKS), sys.executable, "-m", "negpool", "mine", str(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes = [psutil.Process(launcher.pid)]
        try:
            deadline = time.monotonic() + START_S
            while read_status(Path(folder) / "run", "miner").get("phase") != "watching":
                if launcher.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the miner did not start; its last words:\n{Path(log.name).read_text()[-2000:]}")
                time.sleep(0.2)
            processes += processes[0].children(recursive=True)
            yield processes
        finally:
            for process in processes[::-1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait()
