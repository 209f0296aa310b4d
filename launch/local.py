"""Trainer and miner side by side on one machine, each started again when it dies.

The two sides meet only in the run folder. The supervisor starts them, shows what they say of themselves, starts a side
again that died, and on Ctrl-C asks both to stop and waits. Whoever kills the supervisor stops both sides with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import psutil
from rich.markup import escape

from launch.early import mpiexec_path
from launch.restarts import CODES, Ended, Past, Start, Verdict, last_words, size_of, verdict
from launch.shares import LaunchSettings, Shares, cores_in_order
from launch.srun import outside_slurm
from launch.view import View
from trainer.encoder.gpu_share import GPU_SHARE
from trainer.errors import (
    EXIT_MUST_NOT_GO_ON,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FINISHED,
    STOPPED,
    InputError,
    MachineFailed,
    MustNotGoOn,
    RunInUse,
)
from trainer.handoff.claim import refuse_live
from trainer.handoff.retry import patiently
from trainer.interrupt import handlers_kept, on_signals
from trainer.metrics import forget_status, read_status, write_end

POLL_S = 0.5
GONE_AFTER_S = 3.0  # that killed processes may hold a lock
WITHOUT_MINER = "training goes on without new negatives"  # said of a miner that is not started again
STOP_GRACE_S = 60.0  # for a checkpoint to be written, before a side is killed


class TrainerDied(MachineFailed):
    """The trainer died more often than it may be started again; the message says where its last words are."""


@dataclass
class Side:
    """One side of the run: its command, and the processes that came of it."""

    name: Literal["trainer", "miner"]
    command: list[str]
    env: dict[str, str]
    log: Path
    cores: frozenset[int] = frozenset()  # that it uses; none named: all
    niceness: int = 0
    past: Past = field(default_factory=Past)  # what is remembered of the starts before
    found: Start | None = None  # in the run folder, by this start
    log_begin: int = 0  # bytes of the log that earlier starts have written
    process: subprocess.Popen | None = None
    family: set[psutil.Process] = field(default_factory=set)

    def start(self, run: Path) -> None:
        """Start the command in a session of its own, so that the terminal's Ctrl-C reaches only the supervisor."""
        self.found, self.log_begin = Start.of(run, self.name), size_of(self.log)
        with patiently(lambda: open(self.log, "ab"), str(self.log)) as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
                preexec_fn=self._settle,
            )

    def _settle(self) -> None:
        """Take this side's share of the machine, and end with the supervisor; between fork and exec."""
        die_with_parent()
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        if self.niceness:
            os.nice(self.niceness)
            # Linux may weigh sessions against each other, and niceness only inside of one: see autogroup in sched(7).
            with contextlib.suppress(OSError):
                Path("/proc/self/autogroup").write_text(str(self.niceness))

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
            if self.name == "trainer":
                self.process.send_signal(signal.SIGTERM)
                return
            pid = read_status(run, self.name).get("pid")
            if pid in {process.pid for process in self.family}:
                psutil.Process(pid).send_signal(signal.SIGTERM)
                return
        self.process.terminate()


def supervise(run: Path, job_file: Path, settings: LaunchSettings, plan: Shares, view: View) -> Literal["finished", "stopped"]:
    """Run both sides until the trainer is done, or until asked to stop; the trainer alone where the plan has no miner.

    Raises RunInUse, before anything is written, where a live process holds a side's place; InputError or MustNotGoOn when the
    trainer refuses or must not go on, MustNotGoOn also when two starts in a row end at one step without a checkpoint in
    between, TrainerDied if it died more often than it may be started again.
    """
    trainer, miner = sides(run, job_file, plan)
    refuse_live(run, trainer.name, miner.name)
    view.knows(read_status(run, trainer.name).get("swaps", []))
    forget_status(run, trainer.name, miner.name)
    asked: list[int] = []
    miner_is_needed = plan.mine_ranks > 0
    with handlers_kept():
        on_signals((signal.SIGINT, signal.SIGTERM), lambda number, _: asked.append(number))
        try:
            for side in (trainer, miner) if miner_is_needed else (trainer,):
                side.start(run)
            while True:
                view.show(read_status(run, "trainer"), read_status(run, "miner"))
                if asked:
                    view.say("stopping both sides; this may take some seconds, and Ctrl-C once more ends them at once")
                    _stop(run, [trainer, miner], asked)
                    return "stopped"
                if (code := trainer.exit_code()) is not None and (how := _after_trainer(run, trainer, code, settings, view)):
                    _stop(run, [miner], asked)
                    return how
                if miner_is_needed and read_status(run, "trainer").get("training_done"):
                    miner_is_needed = False  # its cores now serve the last evaluation
                    miner.ask_to_stop(run)
                if (code := miner.exit_code()) is not None and miner_is_needed:
                    _after_miner(run, miner, code, settings, view)
                time.sleep(POLL_S)
        finally:
            trainer.kill()
            miner.kill()


def sides(run: Path, job_file: Path, plan: Shares) -> tuple[Side, Side]:
    """Return the two sides, not started, each with its share of the machine."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(plan.threads)}
    env.pop(GPU_SHARE, None)
    env["PYTHONSAFEPATH"] = "1"  # who calls from Python has not set it

    def seeing(gpus: tuple[str, ...], share: float) -> dict[str, str]:
        shared = {GPU_SHARE: str(share)} if share < 1 else {}
        return env | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}) | shared

    module = [sys.executable, "-m", "negpool"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.train_ranks}"]
    launcher = torchrun if plan.train_ranks > 1 else []  # a single rank would wait seconds for its imports
    trainer = Side(
        "trainer",
        [sys.executable, *launcher, "-m", "negpool", "train", str(job_file)],
        seeing(plan.train_gpus, plan.train_share),
        run / "logs" / "trainer.log",
    )
    mpiexec = mpi_command(plan.mine_ranks) if plan.mine_ranks else []
    miner = Side(
        "miner",
        [*mpiexec, *module, "mine", str(job_file)],
        seeing(plan.mine_gpus, plan.mine_share),
        run / "logs" / "miner.log",
        niceness=plan.mine_niceness,
    )
    if plan.mine_cores:
        cores = cores_in_order()
        trainer.cores, miner.cores = frozenset(cores[: -plan.mine_cores]), frozenset(cores[-plan.mine_cores :])
        miner.env["OMP_NUM_THREADS"] = str(plan.mine_threads)
    return trainer, miner


def mpi_command(num_ranks: int) -> list[str]:
    """Return the words that start `num_ranks` MPI processes; raises InputError where MPI is missing."""
    alone = [*outside_slurm(), mpiexec_path()]
    words = [*alone, "-n", str(num_ranks)]
    help_text = subprocess.run([*alone, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" in help_text or "OpenRTE" in help_text or "prte" in help_text.lower():
        # More ranks than cores is normal on a laptop, and containers often run as root.
        words += ["--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return words


def _after_trainer(
    run: Path, trainer: Side, code: int, settings: LaunchSettings, view: View
) -> Literal["finished", "stopped"] | None:
    """Return how the run ended, or None where the trainer was started again; raises as `supervise`."""
    end, follows = _judge(run, trainer, code, settings)
    if STOPPED in (end.phase, {EXIT_STOPPED: STOPPED}.get(code)):
        return "stopped"
    if follows.past is None and not follows.code:
        return "finished"
    if follows.past is None:
        endings: dict[int, type[Exception]] = {EXIT_REFUSED: InputError, EXIT_MUST_NOT_GO_ON: MustNotGoOn}
        error = endings.get(follows.code, TrainerDied)(follows.sentence)
        if end.phase not in CODES:  # it has not said so itself
            write_end(run, trainer.name, error)
        raise error
    how = "from the beginning" if end.checkpoint is None else f"from the checkpoint {end.checkpoint}"
    _start_again(run, trainer, follows.past, code, view, how)
    return None


def _after_miner(run: Path, miner: Side, code: int, settings: LaunchSettings, view: View) -> None:
    """Decide what follows the end of the miner; the trainer goes on in any case."""
    end, follows = _judge(run, miner, code, settings)
    if follows.past is not None:
        try:
            _start_again(run, miner, follows.past, code, view, "training goes on")
        except RunInUse as other:
            view.say(f"{escape(str(other))}; training goes on with the negatives that it publishes")
    elif end.phase != FINISHED and follows.code:
        view.say(f"the miner cannot go on ({escape(follows.sentence)}); {WITHOUT_MINER}")


def _judge(run: Path, side: Side, code: int, settings: LaunchSettings) -> tuple[Ended, Verdict]:
    """Return how a side ended, and what follows."""
    assert side.found is not None
    end, limit = side.found.ended(run, side.name, code), settings.max_restarts
    if end.phase is None and not end.error:
        end = replace(end, error=last_words(side.log, side.log_begin))
    return end, verdict(side.past, end, side=side.name, limit=limit, setting="launch.max_restarts", log=str(side.log))


def _start_again(run: Path, side: Side, past: Past, code: int, view: View, how: str) -> None:
    refuse_live(run, side.name, patience_s=GONE_AFTER_S)
    side.past = past
    view.say(f"the {side.name} ended with code {code}; started again, {how}")
    forget_status(run, side.name)
    side.start(run)


def _stop(run: Path, stopped: list[Side], asked: list[int]) -> None:
    """Ask sides to stop and wait for them, until the time is over or another signal comes."""
    num_asked = len(asked)
    for side in stopped:
        side.exit_code()  # learn its processes first
        side.ask_to_stop(run)
    deadline = time.monotonic() + STOP_GRACE_S
    while any(side.process is not None and side.exit_code() is None for side in stopped):
        if time.monotonic() > deadline or len(asked) > num_asked:
            break
        time.sleep(POLL_S / 5)


def die_with_parent() -> None:
    """Ask this process to end as soon as the one that started it has ended; between fork and exec."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
