"""Fabrics: what a collective takes between the ranks of a node and between nodes, as a TOML file of latencies and bandwidths.

`negpool bench fabric --out FILE.toml` measures one and `negpool plan --fabric` reads it; launch/fabrics/ has some with their
sources. The model is that of alpha and beta: hops times latency, and bytes over bandwidth. It knows a ring, whose hops between
nodes pay what leaves a node, and the tree by which NCCL sums. It knows nothing of other traffic on the same links.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from annotated_types import Interval
from pydantic import ConfigDict

from launch.counted import counted
from launch.jobfile import nearest, read_toml
from trainer.errors import InputError

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
BUILT_IN = Path(__file__).parent / "fabrics"
CONSTANTS = ("latency_s", "bytes_per_s")
MEASURED = "measured by negpool bench fabric"
EXPECTED = {  # of each key of a file
    "name": "a text",
    "ranks_per_node": "a whole number > 0",
    "hardware": "a text",
    "date": "a text, as in 2026-01-31",
    "source": "a text that says where the constants come from",
    "all_reduce": 'the way sums go, "ring" or "tree"',
    "inside": "sections [inside.COLLECTIVE], the constants between the ranks of a node",
    "between": "sections [between.COLLECTIVE], the constants between nodes",
    "latency_s": "the seconds of one hop, a number > 0",
    "bytes_per_s": "the bus bandwidth of a rank in bytes a second, a number > 0",
}
AboveZero = Annotated[float, Interval(gt=0)]
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKED)
class Wire:
    """The two constants of a collective."""

    latency_s: AboveZero  # of one hop
    bytes_per_s: AboveZero  # bus bandwidth of a rank: what it sends over the time, as nccl-tests defines it


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKED)
class Fabric:
    """What joins the ranks. `between` is of rings with a rank of each node, those of all ranks of a node at work at once."""

    name: str
    ranks_per_node: Annotated[int, Interval(ge=1)]
    hardware: str
    date: str
    source: str  # of the constants
    inside: dict[str, Wire] = field(default_factory=dict)  # of one node, by collective; empty: a node has one rank
    between: dict[str, Wire] = field(default_factory=dict)  # of several nodes; empty: there is one
    all_reduce: Literal["ring", "tree"] = "ring"

    def seconds(self, collective: str, num_bytes: float, num_ranks: int) -> float:
        """Return what a collective takes to which nobody comes late.

        num_bytes: of the output of an all-gather, of the input of a reduce-scatter, of the tensor of an all-reduce, of what a
        rank gives in all to an all-to-all. Raises InputError where constants between nodes are needed and missing.
        """
        if collective not in COLLECTIVES:
            raise ValueError(f"{collective} is no collective; known are {', '.join(COLLECTIVES)}")
        if num_ranks == 1:
            return 0.0
        if num_ranks > self.ranks_per_node and not self.between:
            raise InputError(
                f"the fabric {self.name} is of one node of {counted(self.ranks_per_node, 'rank')}, and {num_ranks} were asked "
                "for; measure it with negpool bench fabric on several nodes, or name another one by --fabric"
            )
        near, far = self.inside.get(collective), self.between.get(collective)
        staying, leaving = hops(collective, num_ranks, self.ranks_per_node, self.all_reduce)
        latency_s = (near.latency_s * staying if near else 0.0) + (far.latency_s * leaving if far else 0.0)
        return latency_s + self._moving_s(collective, num_bytes, num_ranks)

    def _moving_s(self, collective: str, num_bytes: float, num_ranks: int) -> float:
        near, far = self.inside.get(collective), self.between.get(collective)
        of_node = min(num_ranks, self.ranks_per_node)
        sent = sent_bytes(collective, num_bytes, num_ranks)
        if collective == "all_to_all":  # what leaves the node and what stays in it move side by side
            leaving = num_bytes * (num_ranks - of_node) / num_ranks
            return max(
                leaving / far.bytes_per_s if far else 0.0,
                (sent - leaving) / near.bytes_per_s if near else 0.0,
            )
        # All that a ring moves passes each of its links. Between nodes it has what all ranks of a node have there together.
        rates = [near.bytes_per_s] if near and of_node > 1 else []
        rates += [far.bytes_per_s * of_node] if far and num_ranks > of_node else []
        return sent / min(rates)


def hops(collective: str, num_ranks: int, ranks_per_node: int, all_reduce: str = "ring") -> tuple[int, int]:
    """Return how many hops stay in a node and how many leave one, on the longest way through a collective.

    Rings of gloo as measured: on two cores the smallest messages took 1, 3 and 7 hops on 2, 4 and 8 ranks, and more for each
    hop where ranks share a core. Trees as NCCL counts them (src/graph/tuning.cc): a chain in a node, a tree of the nodes.
    """
    of_node = min(num_ranks, ranks_per_node)
    num_nodes = math.ceil(num_ranks / of_node)
    if collective == "all_to_all":  # a message to each of the others
        return of_node - 1, num_ranks - of_node
    if collective == "all_reduce" and all_reduce == "tree":
        return 2 * (of_node - 1), 2 * math.ceil(math.log2(num_nodes))
    rounds = 2 if collective == "all_reduce" else 1  # a sum goes around twice
    return rounds * (num_ranks - num_nodes), rounds * (num_nodes - 1)


def sent_bytes(collective: str, num_bytes: float, num_ranks: int) -> float:
    """Return what one rank sends in a collective; num_bytes as `Fabric.seconds` takes them."""
    return (2 if collective == "all_reduce" else 1) * num_bytes * (num_ranks - 1) / num_ranks


def find_fabric(name_or_path: str) -> Fabric:
    """Return a built-in fabric by its name, or one from a file; raises InputError where there is neither."""
    known = built_in_names()
    if name_or_path in known:
        return read_fabric(BUILT_IN / f"{name_or_path}.toml")
    if name_or_path.endswith(".toml") or Path(name_or_path).exists():
        return read_fabric(Path(name_or_path))
    raise InputError(
        f"there is no fabric {name_or_path!r}; {nearest(name_or_path, known)}; a file of your own ends in .toml, and "
        "negpool bench fabric --out FILE.toml measures one"
    )


def built_in_names() -> list[str]:
    """Return the names of the fabrics that come with this package."""
    return sorted(file.stem for file in BUILT_IN.glob("*.toml"))


def write_fabric(path: Path, fabric: Fabric) -> None:
    """Write a file that `read_fabric` reads; raises InputError where it cannot be written."""
    table = {key: value for key, value in asdict(fabric).items() if value != {}}
    try:
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the fabric to {path}: {error.strerror}; set --out to another file") from error


def read_fabric(path: Path) -> Fabric:
    """Return the fabric of a file; raises InputError, naming the file and the key, for what is missing or cannot be."""
    table = read_toml(path, "fabric file", f"negpool bench fabric --out {path} measures one")
    try:
        # Through JSON, in strict mode: no "5" for 5.
        fabric = pydantic.TypeAdapter(Fabric).validate_json(json.dumps(table, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] == "missing")  # a misspelt key is not missed under its own
        raise InputError(f"{path}: {_sentence(first)}") from error
    _refuse_gaps(path, fabric)
    return fabric


def _sentence(error: Any) -> str:
    """Return what is wrong with a key, and what it may be."""
    name, last = ".".join(map(str, error["loc"])), str(error["loc"][-1])
    known = CONSTANTS if len(error["loc"]) == 3 else [key for key in EXPECTED if key not in CONSTANTS]
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {name}; {nearest(last, known)}"
    expected = EXPECTED.get(last, "a section with latency_s and bytes_per_s")
    if error["type"] == "missing":
        return f"{name} is missing; expected {expected}"
    return f"{name}={error['input']!r} cannot be used; expected {expected}"


def _refuse_gaps(path: Path, fabric: Fabric) -> None:
    """Raise InputError for a collective that is unknown, or that a part has no constants of."""
    parts: dict[str, Mapping[str, Wire]] = {"inside": fabric.inside, "between": fabric.between}
    for part, wires in parts.items():
        for collective in wires:
            if collective not in COLLECTIVES:
                raise InputError(f"{path}: unknown collective [{part}.{collective}]; {nearest(collective, COLLECTIVES)}")
        is_needed = wires or (part == "inside" and fabric.ranks_per_node > 1)
        missing = [collective for collective in COLLECTIVES if is_needed and collective not in wires]
        if missing:
            raise InputError(f"{path}: [{part}.{missing[0]}] is missing; expected a section with latency_s and bytes_per_s")
