"""Devices that a plan knows: what one of them reaches, each number with where it comes from.

FILE.toml has the same keys as a row of this table. Shares of the encoder and of the loss are of the rate of a large product;
they were measured on an H200, and are taken for its neighbours, too, until somebody has measured there. `launch_s` and
`process_gib` of the GPUs are assumptions.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from gradcache.free import AbsentDevice
from launch.jobfile import nearest, read_toml
from trainer.errors import InputError

GIB = 2**30
HERE = "cpu"  # measured on this machine, see measured_device.py
SHARES = ("forward_share", "both_share", "loss_share")
MAMF = "github.com/stas00/ml-engineering, maximum achievable matmul FLOPS"
H200 = "shares of it as measured on one H200 on 2026-11-26 (docs/results.md), of the loss as its prototype reached there"


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """What one rank computes on."""

    name: str
    type: Literal["cuda", "cpu"]
    hardware: str
    source: str  # of the numbers
    memory_gib: float
    process_gib: float  # of it, that a process takes before it has a model: CUDA's context and NCCL, or libraries
    memory_bytes_per_s: float  # read and written by a copy or by the optimizer
    peak_flops_per_s: float  # of the data sheet, in 16 bits, dense; of a CPU what a large product reaches
    matmul_flops_per_s: float  # of a large product in 16 bits
    matmul_fp32_flops_per_s: float  # the same in float32
    forward_share: float  # of it that the encoder reaches without graph
    both_share: float  # forward and backward
    compiled_gain: float  # what torch.compile makes of these shares
    launch_s: float  # of the host for one kernel; small chunks wait for it
    loss_share: float  # of the products of scores, with all that the loss does beside
    watts: float | None = None  # at work; of a GPU the most that the data sheet allows

    def rate(self, precision: str) -> float:
        """Return the rate of a large product in what the encoder, or the loss, multiplies in."""
        return self.matmul_fp32_flops_per_s if precision == "fp32" else self.matmul_flops_per_s

    @property
    def memory(self) -> AbsentDevice:
        """What decides about memory."""
        return AbsentDevice(self.type, int(self.memory_gib * GIB))


def _gpu(name: str, hardware: str, source: str, **numbers: float) -> PlannedDevice:
    shares = {
        "process_gib": 1.0,
        "forward_share": 0.41,
        "both_share": 0.38,
        "compiled_gain": 1.2,
        "loss_share": 0.65,
        "launch_s": 8e-6,
    }
    return PlannedDevice(name=name, type="cuda", hardware=hardware, source=source, **shares, **numbers)  # type: ignore[arg-type]


TABLE = {
    device.name: device
    for device in (
        _gpu(
            "h100",
            "NVIDIA H100 SXM, 80 GB",
            f"data sheet: 989 TFLOP/s, 67 in float32, 3.35 TB/s, 700 W; large product 792 TFLOP/s ({MAMF}); {H200}",
            memory_gib=79.6,
            memory_bytes_per_s=3.35e12 * 0.885,  # the share of the data sheet that a copy reached on an H200
            peak_flops_per_s=989e12,
            matmul_flops_per_s=792e12,
            matmul_fp32_flops_per_s=67e12 * 0.8,
            watts=700,
        ),
        _gpu(
            "h200",
            "NVIDIA H200 SXM, 141 GB",
            f"data sheet: 989 TFLOP/s, 67 in float32, 700 W; measured: large product 772 TFLOP/s, copy 4.25 TB/s; {H200}",
            memory_gib=139.7,
            memory_bytes_per_s=4.25e12,
            peak_flops_per_s=989e12,
            matmul_flops_per_s=772e12,
            matmul_fp32_flops_per_s=67e12 * 0.8,
            watts=700,
        ),
        _gpu(
            "a100",
            "NVIDIA A100 SXM, 80 GB",
            f"data sheet: 312 TFLOP/s, 19.5 in float32, 2.04 TB/s, 400 W; large product 268 TFLOP/s ({MAMF}); {H200}",
            memory_gib=79.3,
            memory_bytes_per_s=2.039e12 * 0.885,
            peak_flops_per_s=312e12,
            matmul_flops_per_s=268e12,
            matmul_fp32_flops_per_s=19.5e12 * 0.86,
            watts=400,
        ),
    )
}


def find_device(name_or_path: str) -> PlannedDevice:
    """Return a device of the table, or one from a file; raises InputError where there is neither."""
    if name_or_path in TABLE:
        return TABLE[name_or_path]
    if name_or_path.endswith(".toml") or Path(name_or_path).exists():
        return read_device(Path(name_or_path))
    known = [*TABLE, HERE]
    raise InputError(
        f"--device {name_or_path} is no device that a plan knows; {nearest(name_or_path, known)} Or write a file: "
        "negpool plan --device h100 --out DIR leaves one in DIR/device.toml"
    )


def read_device(path: Path) -> PlannedDevice:
    """Return the device of a file; raises InputError, naming the file and the key, for what is missing or cannot be."""
    table = read_toml(path, "device file", "negpool plan --out DIR leaves one in DIR/device.toml")
    known = {field.name: field for field in fields(PlannedDevice)}
    for key in table:
        if key not in known:
            raise InputError(f"{path}: unknown key {key}; {nearest(key, list(known))}")
    for key in known:
        _check(path, key, table.get(key))
    return PlannedDevice(**table)


def write_device(path: Path, device: PlannedDevice) -> None:
    """Write a device as `read_device` reads it."""
    path.write_text(tomli_w.dumps({key: value for key, value in asdict(device).items() if value is not None}))


def _check(path: Path, key: str, value: Any) -> None:
    """Raise InputError for a key that is missing, or of another kind, or out of its range."""
    if value is None:
        if key == "watts":
            return
        raise InputError(f"{path} has no {key}; set it, as negpool plan --device h100 --out DIR shows in DIR/device.toml")
    if key == "type":
        if value not in get_args(Literal["cuda", "cpu"]):
            raise InputError(f'{path}: type={value!r}, expected "cuda" or "cpu"')
    elif key in ("name", "hardware", "source"):
        if not isinstance(value, str):
            raise InputError(f"{path}: {key}={value!r}, expected text")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{path}: {key}={value!r}, expected a number > 0")
    elif key in SHARES and value > 1:
        raise InputError(f"{path}: {key}={value!r}, expected a share of matmul_flops_per_s, at most 1")
