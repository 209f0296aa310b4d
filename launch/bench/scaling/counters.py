"""What the network cards of a host say they have sent."""

from pathlib import Path

NET, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
WORD_BYTES = 4  # port_xmit_data counts words of four octets, see the kernel's sysfs-class-infiniband


def bytes_sent(on_gpu: bool) -> dict[str, int]:
    """Return the bytes that each interface has sent since the machine started; none where they cannot be read.

    on_gpu: ranks talk by NCCL, which goes by NVLink inside a node, where nothing counts, and by InfiniBand between nodes; so only
    its ports are read.
    """
    if on_gpu:
        ports = INFINIBAND.glob("*/ports/*/counters/port_xmit_data")
        found = {f"{path.parts[-5]}:{path.parts[-3]}": _read(path, WORD_BYTES) for path in ports}
    else:
        found = {path.parts[-3]: _read(path) for path in NET.glob("*/statistics/tx_bytes")}
    return {name: sent for name, sent in found.items() if sent is not None}


def most_sent(before: dict[str, int], after: dict[str, int]) -> tuple[str, int] | None:
    """Return the interface that has sent most in between, and how much; None where there is none."""
    sent = {name: after[name] - before[name] for name in before.keys() & after.keys()}
    return max(sent.items(), key=lambda each: each[1]) if sent else None


def _read(path: Path, unit: int = 1) -> int | None:
    try:
        return int(path.read_text()) * unit
    except (OSError, ValueError):
        return None
