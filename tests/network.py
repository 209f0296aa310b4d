"""A network of one's own for real ranks: a namespace and a core for each rank, joined by a switch with a rate and a delay.

Linux makes it: network namespaces, veth pairs, a bridge, tbf for the rate and netem for the delay. Gloo and TCP are real, and so
are the bytes that an interface counts. Where it cannot be made, the test is skipped and says why.
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import ARGUMENTS, REPORT
from tests.ranks import run_ranks

INTERFACE = "eth0"
MTU = 9000  # jumbo frames, so that two cores keep up with 10 Gb/s
# Bytes that the kernel hands on in one piece: several packets at 1 Gb/s, where two cores fall behind packets one by one; one at
# 0.1 Gb/s, where what passes at once would be much of a message.
PIECE_S, LARGEST_PIECE = 250e-6, 32768
# Of bytes: 66 of Ethernet, IP and TCP with time stamps around each packet or piece, and acknowledgements. 1.004 to 1.009 as seen.
HEADERS = 1 + 66 / (MTU - 52)
CLONE_NEWNET = 0x40000000  # setns(2)
BURST_S = 50e-6  # of data that passes at once; never less than a piece and a packet
QUEUE_BYTES = 64 * 2**20  # more than all senders have under way: nothing is lost


@dataclass(frozen=True)
class Network:
    """Namespaces PREFIX-RANK, which a switch in PREFIX-switch joins."""

    prefix: str
    num_ranks: int
    gbit_per_s: float
    delay_ms: float

    def run(self, fn: Callable, *args: Any, timeout_s: float = 120) -> list[Any]:
        """Return fn(rank, *args) of every rank, as `run_ranks`; the ranks reach each other through this network alone."""
        return run_ranks(fn, self.num_ranks, *args, timeout_s=timeout_s, before=functools.partial(enter, self.prefix))

    def command(self, rank: int, *words: str) -> list[str]:
        """Return a command line that runs another one in a rank's namespace, on its core."""
        return ["ip", "netns", "exec", f"{self.prefix}-{rank}", "taskset", "-c", str(core_of(rank)), *words]

    def environment(self, rank: int) -> dict[str, str]:
        """Return what torchrun would tell a rank; each is a node of its own."""
        place = {"RANK": rank, "WORLD_SIZE": self.num_ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        place |= {"MASTER_ADDR": address(0), "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": INTERFACE}
        place |= {"SLURMD_NODENAME": f"node{rank}"}  # a host's name, for those who count what each host has sent
        return {**os.environ, **{name: str(value) for name, value in place.items()}}

    def sent_bytes(self, rank: int) -> int:
        """Return what a rank has sent so far, headers included."""
        shown = _ip("-n", f"{self.prefix}-{rank}", "-s", "link", "show", INTERFACE).splitlines()
        return int(shown[shown.index(next(line for line in shown if "TX:" in line)) + 1].split()[0])


def measured_step(made: Network, timeout_s: float = 300, **arguments: Any) -> dict[str, Any]:
    """Return what a job's steps take on the network's ranks, as launch/bench/scaling/worker.py says it; each rank is a process.

    arguments: of the worker's `measure_size`. In the answer, `step_s` are seconds and `bytes` what a rank sends in a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        asked = {ARGUMENTS: json.dumps(arguments), REPORT: str(report)}
        words = (sys.executable, "-m", "launch.bench.scaling.worker")
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks = [
            subprocess.Popen(made.command(rank, *words), env=made.environment(rank) | asked, **piped)
            for rank in range(made.num_ranks)
        ]
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ranks[0].wait(timeout_s)
        finally:
            for rank in ranks:
                rank.kill()  # the first one has reported, or something is wrong
            said = [rank.communicate()[0][-2000:] for rank in ranks]
        assert report.exists(), "\n".join(said)
        return json.loads(report.read_text())


@contextlib.contextmanager
def network(num_ranks: int, gbit_per_s: float, delay_ms: float = 0.0) -> Iterator[Network]:
    """Make a network, and take it away. Skips the test where this machine cannot have it.

    gbit_per_s: of each rank's interface, each way. delay_ms: one way, beside what the machine itself takes.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and iproute2 (tests/packages.sh)")
    made = Network(f"negpool{os.getpid()}", num_ranks, gbit_per_s, delay_ms)
    try:
        try:
            _make(made)
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.split())
            pytest.skip(f"this machine cannot have the network: {' '.join(error.cmd)}: {said}")
        yield made
    finally:
        for end in (*range(num_ranks), "switch"):
            subprocess.run(["ip", "netns", "delete", f"{made.prefix}-{end}"], capture_output=True)


def _make(made: Network) -> None:
    switch = f"{made.prefix}-switch"
    bytes_per_s = made.gbit_per_s * 1e9 / 8
    piece = min(LARGEST_PIECE, max(MTU, int(PIECE_S * bytes_per_s)))
    burst = max(piece + MTU, int(BURST_S * bytes_per_s))
    rate = f"{made.gbit_per_s * 1000:g}mbit"
    shaped = ["tbf", "rate", rate, "burst", str(burst), "limit", str(QUEUE_BYTES)]
    late = ["netem", "limit", "100000", "delay", f"{made.delay_ms}ms", "rate", rate]
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "mtu", str(MTU), "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for rank in range(made.num_ranks):
        own, port = f"{made.prefix}-{rank}", f"port{rank}"
        _ip("netns", "add", own)
        _ip("-n", switch, "link", "add", port, "mtu", str(MTU), "type", "veth", "peer", "name", INTERFACE, "netns", own)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", own, "link", "set", INTERFACE, "mtu", str(MTU), "gso_max_size", str(piece), "up")
        _ip("-n", own, "link", "set", "lo", "up")
        _ip("-n", own, "address", "add", f"{address(rank)}/16", "dev", INTERFACE)
        # The one control that every kernel has in a namespace, and the machine's own may be another.
        _run("ip", "netns", "exec", own, "sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        _run("tc", "-n", own, "qdisc", "add", "dev", INTERFACE, "root", *shaped)
        _run("tc", "-n", switch, "qdisc", "add", "dev", port, "root", *(late if made.delay_ms else shaped))


def enter(prefix: str, rank: int) -> None:
    """Bring this process, which has one thread yet, into a rank's namespace and onto its core."""
    handle = os.open(f"/run/netns/{prefix}-{rank}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(handle)
    os.sched_setaffinity(0, {core_of(rank)})
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def own_sent_bytes() -> int:
    """Return what the interface of this process's namespace has sent so far, headers included."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith(f"{INTERFACE}:")).split(":")[1].split()[8])


def core_of(rank: int) -> int:
    """Return a rank's core; with more ranks than cores they share them."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[rank % len(cores)]


def address(rank: int) -> str:
    """Return a rank's address."""
    return f"10.77.0.{rank + 1}"


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
