"""What the machine can do, and what a piece of work took of it: time, peak memory, products per second."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trainer.world import keep_freed_memory

PRODUCTS = {"cpu": (256, 2048), "cuda": (8192,)}  # sizes of the square matrices whose product gives the rate
SLOW_PRODUCT = 4e9  # operations a second, below which no larger product is tried


@dataclass
class Cost:
    """Filled when the work is done."""

    seconds: float = 0.0
    peak_gib: float = 0.0  # above what was held before


@contextmanager
def measured(device: torch.device, held: int | None = None) -> Iterator[Cost]:
    """Measure what happens inside; memory above `held` bytes, or above what is held at the start."""
    cost = Cost()
    now = start_peak(device)
    before = now if held is None else held
    _wait(device)
    started = time.perf_counter()
    yield cost
    _wait(device)
    cost.seconds = time.perf_counter() - started
    cost.peak_gib = max(0.0, (peak_bytes(device) - before) / 2**30)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let the C library return large blocks as soon as they are freed: a peak is then what is needed, not what is reused."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD of malloc.h
    try:
        yield
    finally:
        keep_freed_memory()


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the machine's floating-point operations per second in a large matrix product, the best of five.

    A processor that has no instructions for a type would take minutes for a large one: there it is a small one's.
    """
    rate = 0.0
    for size in PRODUCTS[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / min(seconds_of(partial(torch.mm, left, right), device) for _ in range(5))
        if rate < SLOW_PRODUCT:
            break
    return rate


def tiled_product(query_QD: torch.Tensor, passage_ND: torch.Tensor, tile: tuple[int, int]) -> None:
    """Multiply queries with passages in tiles of (queries, passages); the scores of one tile are overwritten by the next."""
    tile_rows, tile_columns = tile
    space = query_QD.new_empty(tile_rows * tile_columns)
    for part_CD in passage_ND.split(tile_columns):
        for part_tD in query_QD.split(tile_rows):
            torch.mm(part_tD, part_CD.T, out=space[: len(part_tD) * len(part_CD)].view(len(part_tD), -1))


def seconds_of(work: Callable, device: torch.device) -> float:
    """Return how long a call takes; of a GPU by its own clock."""
    _wait(device)
    if device.type == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        _wait(device)
        return begun.elapsed_time(ended) / 1000
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def describe(device: torch.device) -> dict:
    """Return the hardware in words and numbers."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    model = "CPU"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"device": model, "threads": torch.get_num_threads(), "torch": torch.__version__}


def start_peak(device: torch.device) -> int:
    """Forget earlier peaks; return the bytes that this process holds now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the C library keeps would hide what is needed
    restart_peak(device)
    return _status_bytes("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Forget earlier peaks, at once: nothing is given back, nothing waits."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process since it began, or since `start_peak`."""
    return _status_bytes("VmHWM")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held since `start_peak`: of its GPU, or of the host."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def _status_bytes(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
