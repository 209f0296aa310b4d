"""A node's launcher: what it reads of Slurm's environment, and what becomes of its ranks' ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.node import Place
from trainer.errors import InputError

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "a3,b1",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}


def test_a_place_is_read_from_the_step():
    place = Place.of_step(STEP)
    assert (place.node, place.num_nodes, place.num_gpus, place.cpus, place.master) == (1, 2, 8, 64, "a3")


def test_a_launcher_outside_a_step_or_beside_another_is_refused():
    with pytest.raises(InputError, match=r"launch.node is for srun, on the nodes of a Slurm job; on one machine: torchrun"):
        Place.of_step({})
    with pytest.raises(InputError, match=r"srun started 8 launchers on 2 nodes.* set --ntasks-per-node=1"):
        Place.of_step(STEP | {"SLURM_STEP_NUM_TASKS": "8"})


RANK = """
import os, signal, sys, time
from pathlib import Path
def leave(number, frame):
    time.sleep(1)  # to save
    sys.exit(75)
signal.signal(signal.SIGUSR1, leave)
folder = Path(sys.argv[1])
(folder / os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"] + os.environ["OMP_NUM_THREADS"])
while not (folder / "end").exists():
    time.sleep(0.05)
if os.environ["RANK"] == (folder / "end").read_text():
    os.kill(os.getpid(), signal.SIGKILL)
"""
LAUNCH = """
import sys
from launch.node import Place, launch_ranks
place = Place("12", 0, 1, 0, 6, "127.0.0.1", int(sys.argv[1]))
sys.exit(launch_ranks(place, 2, sys.argv[2:]))
"""


@pytest.fixture
def launcher(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LAUNCH, str(port), tmp_path / "rank.py", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen([*map(str, command)], env=environment, cwd=Path(__file__).parent.parent.parent)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()


def test_a_signal_reaches_the_ranks_and_their_exit_code_comes_back(launcher):
    process, folder = launcher
    assert (folder / "0").read_text() == "23", "two ranks share six cores"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75


def test_the_end_of_a_killed_rank_is_that_of_the_launcher(launcher):
    process, folder = launcher
    (folder / "end").write_text("1")
    assert process.wait(60) == 128 + signal.SIGKILL
