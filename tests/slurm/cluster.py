"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd for each of a few nodes, all under one folder.

Debian builds Slurm so that several slurmd run beside each other (`slurmd -N n1`). Each node is a namespace of processes, mounts
and host name: jobs see `n1` as their host, `crash` is a power cut that leaves nothing running, and so is the end of the test.
Needs root, and no GPU (the nodes' are links to /dev/null), no systemd and no cgroups.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

INSTALL = "apt-get install --no-install-recommends munge slurmctld slurmd slurm-client libpmix-dev libpmi2-0"
TIMEOUT_S = 60
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
# A requeued job may start again when its old credentials are void: after 120 s by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# A folder for each node, where pmix would otherwise find the other nodes' sockets.
TmpFS={folder}/tmp/%n
MailProg=/bin/true
# Counts of cores and memory are those given here, whatever the machine has.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
# A dead node is noticed after 13 to 25 s, a job that does not end when asked is killed after 5.
SlurmdTimeout=10
KillWait=5
ReturnToService=1
# Ended jobs are remembered until the tests are over, and a busy machine may take its time to answer.
MinJobAge=7200
MessageTimeout=60
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why there can be no cluster here, and the command that helps; None if there can be one."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if _program(name) is None]
    if missing or not _has_pmix():
        return f"Slurm is not installed ({', '.join(missing) or 'libpmix.so'} missing); run: {INSTALL}"
    if subprocess.run([*UNSHARE, "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True).returncode:
        return "nodes need namespaces of their own, which this container does not allow; run it with --privileged"
    return None


UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
NODE = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && slurmd -N "$1" -f "$2/slurm.conf" && exec sleep infinity'


class Cluster:
    """Nodes n1, n2, …, two GPUs each; a job in partition urgent preempts those in main."""

    def __init__(self, folder: Path, num_nodes: int, cpus: int = 8, first_job: int = 1):
        """Processes end with the thread that makes the cluster.

        folder: short, for sockets lie in it.
        first_job: the number of the first job. Ranks meet at a port that follows from their job's number, so clusters that are
            up at the same time need numbers of their own, 100 apart.
        """
        self.folder, self.env = folder, {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.is_over = False  # told to those who wait for something on it
        self._processes: dict[str, subprocess.Popen] = {}
        self._write_conf(cpus, first_job)

    def up(self) -> None:
        """Start everything and wait until all nodes are idle."""
        key, munge = self.folder / "munge.key", self.folder / "munge.sock"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        # --force: a folder below one that only root may enter will do.
        options = {"socket": munge, "key-file": key, "seed-file": self.folder / "munge.seed", "origin": "127.0.0.1"}
        files = {"pid-file": self.folder / "munge.pid", "log-file": self.folder / "log" / "munged.log"}
        self._start("munged", "-F", "--force", *(f"--{name}={value}" for name, value in (options | files).items()))
        wait_until(lambda: subprocess.run(["munge", "-n", "-S", munge], capture_output=True).returncode == 0, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.boot(node)
        wait_until(lambda: self.states() == {"idle"}, "idle nodes")

    def down(self) -> None:
        """End everything, jobs included."""
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        self._processes.clear()

    def boot(self, node: str) -> None:
        """Start a node."""
        # Whoever is first in a namespace takes in the orphans; sleep never reaps them, and they go with it.
        self._start(node, *UNSHARE, "bash", "-c", NODE, node, node, self.folder)

    def crash(self, node: str) -> None:
        """Cut a node's power."""
        process = self._processes.pop(node)
        process.kill()  # --kill-child: the first process of the namespace dies of it, and the whole namespace with that
        process.wait()

    def silence(self, node: str) -> None:
        """Let a node answer no more, while what runs on it lives on."""
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "slurmd" and ["-N", node] == (process.info["cmdline"] or [])[1:3]:
                process.kill()

    def states(self) -> set[str]:
        """Return the states that nodes are in."""
        found = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env=self.env, capture_output=True, text=True)
        return set(found.stdout.split())

    def run(self, *words: object) -> str:
        """Run one of Slurm's commands to its end and return what it says."""
        done = subprocess.run([str(word) for word in words], env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` says, by field; of a heterogeneous job, what it says of the first component."""
        words = self.run("scontrol", "show", "job", "-o", number).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def told_about(self, number: int) -> str:
        """Return what the controller wrote down about a job."""
        lines = (self.folder / "log" / "slurmctld.log").read_text().splitlines()
        return "\n".join(line for line in lines if re.search(rf"JobId={number}\b", line))

    def _start(self, name: str, *words: object) -> None:
        command = [str(word) for word in words]
        command = [_program(name) or name, *command] if name not in self.nodes else command
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _write_conf(self, cpus: int, first_job: int) -> None:
        host, ports = socket.gethostname().split(".")[0], _free_ports(len(self.nodes) + 1)
        for name in ("state", "log", "tmp", "spool"):
            (self.folder / name).mkdir(parents=True)
        lines = [CONF.format(host=host, port=ports[0], first_job=first_job, folder=self.folder)]
        hosts = Path("/etc/hosts").read_text()
        for number, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True), 1):
            lines.append(f"NodeName={node} NodeAddr=127.0.1.{number} Port={port} CPUs={cpus} RealMemory=4000 Gres=gpu:2\n")
            hosts += f"127.0.1.{number} {node}\n"
            (self.folder / "spool" / node).mkdir()
            (self.folder / "tmp" / node).mkdir()
        (self.folder / "hosts").write_text(hosts)
        (self.folder / "slurm.conf").write_text("".join(lines))
        # slurmd opens a plugin for cgroups even where nothing uses them; this one needs no mount at its start.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in ("gpu0", "gpu1"):
            (self.folder / gpu).symlink_to("/dev/null")
        nodes = ",".join(self.nodes)
        (self.folder / "gres.conf").write_text("".join(f"NodeName={nodes} Name=gpu File={self.folder}/gpu{i}\n" for i in (0, 1)))


def wait_until(is_so: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S, poll_s: float = 0.2) -> None:
    """Wait, and raise AssertionError with what was waited for when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(poll_s)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _has_pmix() -> bool:
    """Tell whether Slurm's plugin finds the library under the name it opens, which only libpmix-dev brings."""
    return any(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
