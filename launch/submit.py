"""`negpool submit`: fill the batch files in `slurm/` with a job and its size, and hand them to Slurm.

What is wrong with a job should show here and not after hours in a queue: the job is read and resolved, Slurm is asked for its
partitions and for the protocol that the MPI library speaks, and the run folder for live jobs. Jobs run what the run folder keeps,
so that editing the job file changes nothing that waits.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.agree import mpi_plugin
from launch.jobfile import Jobs
from launch.sides import keep_job
from trainer.errors import InputError, RunInUse
from trainer.handoff.manifest import disk_error, write_atomically

NO_SLURM = "Not tried: this machine has no Slurm. Run the same negpool submit on a login node of the cluster."
EARLY_S = 60  # that Slurm's signals may come before their time
NUMBER = "TRAIN"  # where a command is shown whose trainers' job has no number yet
BATCH_FILES = Path(__file__).parent.parent / "slurm"
ASK_MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a run asks of a cluster."""

    nodes: int  # of the trainers
    gpus_per_node: int  # 0: ranks on cores, as many as section launch says
    miner_nodes: int  # 0: no miner
    cpus_per_rank: int
    partition: str | None  # None: the cluster's default
    time: str | None  # limit of one start, as Slurm writes it; None: the partition's
    save_seconds: int  # before the limit
    max_restarts: int
    together: bool  # one heterogeneous job
    options: tuple[str, ...]  # any others of sbatch

    def __post_init__(self) -> None:
        limit_s = None if self.time is None else seconds_of(self.time)
        if limit_s is not None and limit_s <= self.save_seconds + EARLY_S:
            raise InputError(
                f"--time {self.time} is over before a checkpoint can be saved: the signal to save comes {self.save_seconds} s "
                f"before the limit, or up to {EARLY_S} s earlier; set --time higher, or --save-seconds lower"
            )
        check_options(self.options)


def submit(jobs: Jobs, size: Size, dry_run: bool, allow_change: bool = False) -> dict[str, Any]:
    """Submit a job's trainers and miner; return run folder, commands and, unless dry_run, the numbers of the jobs.

    dry_run: everything but the submission itself. Slurm says what it thinks of each command, where there is one on this machine.
    Raises InputError for what cannot be submitted, RunInUse for a run folder where a job waits or works.
    """
    run = jobs.train.run.folder
    if "\\" in str(run.absolute()):
        raise InputError(f"run.folder={run} has a backslash, and Slurm numbers no logs in such a folder; rename it")
    from trainer.encoder.model import check_model  # seconds, which a refusal by Slurm does not take

    has_slurm = shutil.which("sbatch") is not None
    if has_slurm or not dry_run:
        check_slurm(size.partition)
    check_model(jobs.train.model.name)
    plugin = _mpi_plugin(has_slurm) if size.miner_nodes else None
    if has_slurm:
        _refuse_live(run)
    keep_job(jobs, allow_change)
    _check_writable(run / "logs")
    environment = {"NEGPOOL_PYTHON": sys.executable, "NEGPOOL_MAX_RESTARTS": str(size.max_restarts)}
    environment |= {"NEGPOOL_SAVE_SECONDS": str(size.save_seconds)}
    environment |= {} if plugin is None else {"NEGPOOL_MPI": plugin}
    found: dict[str, Any] = {"run": str(run)}
    if dry_run:
        found["slurm_says"] = _slurm_says(jobs, size, environment) if has_slurm else None
        commands = batch_commands(jobs, size, NUMBER)
        found["scripts"] = {script.name: script.read_text() for words in commands.values() for script in map(Path, words)
                            if script.parent == BATCH_FILES}  # fmt: skip
    else:
        found["jobs"], commands = _submit_all(jobs, size, environment)
    found["commands"] = {name: _shown(environment, command) for name, command in commands.items()}
    if not dry_run:
        write_atomically(run / "slurm.json", json.dumps(found | {"submitted": time.time()}, indent=1))
    return found


def describe(found: dict[str, Any]) -> str:
    """Return what was submitted, and how to follow and stop it, as lines for a person."""
    run, numbers = shlex.quote(found["run"]), found.get("jobs", {})
    if not numbers:
        scripts = [f"# ---- slurm/{name}\n{text}" for name, text in found["scripts"].items()]
        says = found["slurm_says"] or {}
        commands = [f"{command}\n  {says.get(name, NO_SLURM)}" for name, command in found["commands"].items()]
        number = [f"{NUMBER} stands for the number of the trainers' job."] if "mine" in found["commands"] else []
        return "\n".join([*scripts, *commands, *number, f"Not submitted. {run}/job.toml is what the jobs would run."])
    logs = " ".join(f"{run}/logs/slurm-*-{number}.out" for number in numbers.values())
    return "\n".join(
        [
            *(f"{name:<8} Slurm job {number}" for name, number in numbers.items()),
            f"Follow:  negpool status {run}   or   tail -F {logs}",
            f"Stop:    scancel {' '.join(map(str, numbers.values()))}   (the same negpool submit goes on from there)",
        ]
    )


def batch_commands(jobs: Jobs, size: Size, trainers: str = "") -> dict[str, list[str]]:
    """Return the words of each sbatch command by side, in the order of submission.

    trainers: number of their job, on which the miner's depends; "": not known, and the miner depends on nothing.
    """
    run, launch = jobs.train.run.folder.absolute(), jobs.launch  # a relative one might begin with a dash
    gpus = [f"--gpus-per-node={size.gpus_per_node}"] if size.gpus_per_node else []
    common = [*([f"--partition={size.partition}"] if size.partition else []), *([f"--time={size.time}"] if size.time else [])]
    common.append(f"--signal=USR1@{size.save_seconds}")
    train_ranks, mine_ranks = (size.gpus_per_node or ranks for ranks in (launch.train_ranks, launch.mine_ranks))
    train = [f"--nodes={size.nodes}", *gpus, f"--cpus-per-task={train_ranks * size.cpus_per_rank}"]
    train += [*common, *size.options]
    mine = [f"--nodes={size.miner_nodes}", f"--ntasks-per-node={mine_ranks}", *gpus, f"--cpus-per-task={size.cpus_per_rank}"]
    mine += [*common, *size.options]
    job, logs = str(run / "job.toml"), str(run / "logs").replace("%", "%%")  # Slurm's patterns begin with %

    def command(name: str, *words: str) -> list[str]:
        return ["sbatch", "--parsable", f"--output={logs}/slurm-{name}-%j.out", *words]

    if size.together:
        return {"train_and_mine": command("both", *train, ":", *mine, str(BATCH_FILES / "train_and_mine.sbatch"), job)}
    commands = {"train": command("train", *train, str(BATCH_FILES / "train.sbatch"), job)}
    if size.miner_nodes:
        # after: once the trainers have begun, for before that there is nothing to mine from but words.
        mine, last = ([f"--dependency=after:{trainers}", *mine], [trainers]) if trainers else (mine, [])
        commands["mine"] = command("mine", *mine, str(BATCH_FILES / "mine.sbatch"), job, *last)
    return commands


def check_options(options: tuple[str, ...]) -> None:
    """Raise InputError for what is no option of sbatch, or keeps the environment from jobs."""
    for option in options:
        if not option.startswith("-"):
            raise InputError(f"--sbatch={option} is no option of sbatch; expected one word with two dashes, as --account=me")
    site = f"SBATCH_EXPORT={os.environ.get('SBATCH_EXPORT', 'ALL')}"
    exported = [site, *(option for option in options if option.startswith("--export="))][-1]
    if "ALL" not in exported.partition("=")[2].split(","):
        raise InputError(f"{exported} keeps this environment from the jobs, which need it; set --sbatch=--export=ALL")


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit as Slurm writes it: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s; None for no limit."""
    if limit.lower() in ("infinite", "unlimited"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        raise InputError(f"--time {limit} is no time limit; expected minutes, or hours:minutes:seconds, or days-hours")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:
        return ((days or 0) * 24 + (first or 0)) * 3600 + (second or 0) * 60 + (third or 0)
    return (first or 0) * 60 + (second or 0)


def check_slurm(partition: str | None) -> None:
    """Raise InputError where nothing can be submitted, or the cluster has no such partition."""
    if shutil.which("sbatch") is None:
        raise InputError(
            "there is no sbatch here: this machine is no part of a Slurm cluster; submit from one that is, or use negpool run"
        )
    if not (BATCH_FILES / "train.sbatch").exists():
        raise InputError(f"{BATCH_FILES} has no batch files; install negpool from a checkout, with pip install -e")
    asked = ask_slurm("sinfo", "-h", "-o", "%R")
    partitions = sorted(set(asked.split()))
    if partition is not None and not set(partition.split(",")) <= set(partitions):
        raise InputError(f"this cluster has no partition {partition}; it has {', '.join(partitions)}; set --partition")


def _slurm_says(jobs: Jobs, size: Size, environment: dict[str, str]) -> dict[str, str]:
    """Return what Slurm thinks of each command, which it does not run."""
    tried = {name: ["sbatch", "--test-only", *words[1:]] for name, words in batch_commands(jobs, size).items()}
    return {name: " ".join(sbatch(environment, words)).strip() for name, words in tried.items()}


def _mpi_plugin(has_slurm: bool) -> str:
    """Return srun's plugin for the MPI library behind mpi4py; has_slurm: whether there is a Slurm here that must have it."""
    asked = subprocess.run([sys.executable, "-c", ASK_MPI], capture_output=True, text=True)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"no MPI for the miner ({reason[0]}); install one: pip install 'negpool[mpi]', or set --miner-nodes 0")
    library = asked.stdout.split(",")[0].strip()
    wanted = mpi_plugin(library)
    if wanted is not None and not has_slurm:
        return wanted
    listed = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True)
    plugins = re.findall(r"^\s*(\w+)$", listed.stdout + listed.stderr, flags=re.MULTILINE)
    if wanted is None or wanted not in plugins:
        raise InputError(
            f"mpi4py works with {library}, which needs srun --mpi={wanted or '?'}, and this Slurm has {', '.join(plugins)}; "
            "install mpi4py with an MPI library that it can start, or set --miner-nodes 0"
        )
    return wanted


def _refuse_live(run: Path) -> None:
    """Raise RunInUse if a job that was submitted for a run waits or works; its lock would refuse a second one only later."""
    try:
        numbers = json.loads((run / "slurm.json").read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return
    for side, number in numbers.items():
        state = subprocess.run(["squeue", "-h", "-j", str(number), "-o", "%T"], capture_output=True, text=True).stdout.split()
        if state:
            raise RunInUse(
                f"Slurm job {number} ({side}, {state[0]}) is at work in {run}; wait for it, stop it with "
                f"scancel {' '.join(map(str, numbers.values()))}, or set run.folder"
            )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


def _submit_all(jobs: Jobs, size: Size, environment: dict[str, str]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Submit all, or nothing; return the number and the words of each command."""
    numbers: dict[str, int] = {}
    commands: dict[str, list[str]] = {}
    for name in batch_commands(jobs, size):
        commands[name] = batch_commands(jobs, size, str(numbers.get("train", "")))[name]
        try:
            number, _ = sbatch(environment, commands[name])
        except InputError:
            for earlier in numbers.values():
                subprocess.run(["scancel", str(earlier)])  # half a run is none
            raise
        numbers[name] = int(number.split(";")[0])  # with several clusters, their name follows
    return numbers, commands


def sbatch(environment: dict[str, str], words: list[str]) -> tuple[str, str]:
    """Return what sbatch answers, and what it says beside: a site may have something to tell everybody. Raises InputError."""
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"Slurm refuses the job: {_first_error(done.stderr)}; the command was: {shlex.join(words)}")
    return done.stdout.strip(), done.stderr.strip()


def ask_slurm(*words: str) -> str:
    """Return what one of Slurm's commands answers; raises InputError."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"Slurm does not answer: {words[0]} says {_first_error(done.stderr)}")
    return done.stdout


def _first_error(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line]
    return lines[-1].split("error: ")[-1] if lines else "nothing"


def _shown(environment: dict[str, str], command: list[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
