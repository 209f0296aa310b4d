"""Trainer and miner side by side on one machine, each started again when it dies.

The two sides meet only in the run folder. The supervisor starts them, shows what they say of themselves, starts a side
again that died, and on Ctrl-C asks both to stop and waits. Whoever kills the supervisor stops both sides with it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from launch.plan import LaunchSettings, Plan
from launch.srun import outside_slurm
from launch.view import View
from trainer.errors import InputError
from trainer.handoff.weights import steps_on_disk
from trainer.metrics import forget_status, read_status

POLL_S = 0.5
EXIT_REFUSED = 2
STOP_GRACE_S = 60.0  # for a checkpoint to be written, before a side is killed


class TrainerDied(Exception):
    """The trainer died more often than it may be started again; the message says where its last words are."""


@dataclass
class Side:
    """One side of the run: its command, and the processes that came of it."""

    name: Literal["trainer", "miner"]
    command: list[str]
    env: dict[str, str]
    log: Path
    restarts: int = 0
    process: subprocess.Popen | None = None
    family: set[psutil.Process] = field(default_factory=set)

    def start(self) -> None:
        """Start the command in a session of its own, so that the terminal's Ctrl-C reaches only the supervisor."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def exit_code(self) -> int | None:
        """Return the code with which the side ended, after clearing what it left behind; None while it lives."""
        if self.process is None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        code = self.process.poll()
        if code is not None:
            self.kill()
        return code

    def kill(self) -> None:
        """End every process of this side at once."""
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil refuses a reused process id
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()
        self.family, self.process = set(), None

    def ask_to_stop(self, run: Path) -> None:
        """Ask a side to save and leave."""
        if self.process is None:
            return
        # The ranks themselves: mpiexec would pass a signal on and then kill without waiting.
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(read_status(run, self.name).get("pid", -1)) if self.name == "miner" else self.process
            if self.name == "trainer" or leader in self.family:
                leader.send_signal(signal.SIGTERM)
                return
        self.process.terminate()


def supervise(run: Path, job_file: Path, settings: LaunchSettings, plan: Plan, view: View) -> Literal["finished", "stopped"]:
    """Run both sides until the trainer is done, or until asked to stop; raises InputError when a side refuses the job.

    Raises TrainerDied if it died more often than it may be started again.
    """
    trainer, miner = sides(run, job_file, plan)
    forget_status(run)
    stop_asked: list[int] = []
    miner_is_needed = True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop_asked.append(n))
    try:
        for side in (trainer, miner):
            side.start()
        while True:
            view.show(read_status(run, "trainer"), read_status(run, "miner"))
            if stop_asked:
                view.say("stopping both sides; this may take some seconds")
                _stop(run, [trainer, miner])
                return "stopped"
            if (code := trainer.exit_code()) is not None:
                phase = read_status(run, "trainer").get("phase")
                if phase == "refused":
                    raise InputError(read_status(run, "trainer")["error"])
                if phase in ("finished", "stopped"):
                    _stop(run, [miner])
                    return phase
                if trainer.restarts >= settings.max_restarts:
                    raise TrainerDied(f"the trainer died {trainer.restarts + 1} times; its last words are in {trainer.log}")
                _start_again(trainer, code, settings, view, _from_step(run))
            if miner_is_needed and read_status(run, "trainer").get("training_done"):
                miner_is_needed = False  # its cores now serve the last evaluation
                miner.ask_to_stop(run)
            if (code := miner.exit_code()) is not None and miner_is_needed:
                _after_miner(run, miner, code, settings, view)
            time.sleep(POLL_S)
    finally:
        trainer.kill()
        miner.kill()


def sides(run: Path, job_file: Path, plan: Plan) -> tuple[Side, Side]:
    """Return the two sides, not started, each with its share of the machine."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(plan.threads)}

    def seeing(gpus: tuple[str, ...]) -> dict[str, str]:
        return env | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})

    module = [sys.executable, "-m", "launch"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={plan.train_ranks}",
    ]
    trainer = Side(
        "trainer",
        [*torchrun, "-m", "launch", "train", str(job_file)],
        seeing(plan.train_gpus),
        run / "logs" / "trainer.log",
    )
    mpiexec = [*mpi_command(plan.mine_ranks)]
    miner = Side(
        "miner",
        [*mpiexec, *module, "mine", str(job_file)],
        seeing(plan.mine_gpus),
        run / "logs" / "miner.log",
    )
    return trainer, miner


def mpi_command(num_ranks: int) -> list[str]:
    """Return the words that start `num_ranks` MPI processes; raises InputError where MPI is missing."""
    beside = Path(sys.executable).parent / "mpiexec"  # the PyPI wheel puts it there
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise InputError("no mpiexec found for the miner; install one: pip install 'negpool[mpi]'")
    alone = [*outside_slurm(), mpiexec]
    words = [*alone, "-n", str(num_ranks)]
    help_text = subprocess.run([*alone, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" in help_text or "OpenRTE" in help_text or "prte" in help_text.lower():
        # More ranks than cores is normal on a laptop, and containers often run as root.
        words += ["--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return words


def _after_miner(run: Path, miner: Side, code: int, settings: LaunchSettings, view: View) -> None:
    """Decide what follows the end of the miner; the trainer goes on in any case."""
    if code == 0:
        return
    status = read_status(run, "miner")
    if status.get("phase") == "refused" or code == EXIT_REFUSED:
        reason = status.get("error") or f"its last words are in {miner.log}"
        view.say(f"the miner cannot go on ({reason}); training goes on without new negatives")
    elif miner.restarts < settings.max_restarts:
        _start_again(miner, code, settings, view, "training goes on")
    else:
        view.say(f"the miner ended with code {code} once more; training goes on without, its last words are in {miner.log}")


def _start_again(side: Side, code: int, settings: LaunchSettings, view: View, how: str) -> None:
    side.restarts += 1
    view.say(f"the {side.name} ended with code {code}; started again ({side.restarts} of {settings.max_restarts}), {how}")
    side.start()


def _from_step(run: Path) -> str:
    steps = steps_on_disk(run)
    return f"from the checkpoint of step {steps[-1]}" if steps else "from the beginning"


def _stop(run: Path, stopped: list[Side]) -> None:
    for side in stopped:
        side.exit_code()  # learn its processes first
        side.ask_to_stop(run)
    deadline = time.monotonic() + STOP_GRACE_S
    while any(side.process is not None and side.exit_code() is None for side in stopped):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S / 5)


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
