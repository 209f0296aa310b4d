"""docs/monitoring.md names every figure that the two sides of a run record."""

import fnmatch
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from mpi4py import MPI

from mining.exporter import GAUGES
from mining.service import run_service
from mining.settings import FilterSettings
from tests.mining.run import as_job, make_job
from tests.tiny import write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.encoder.settings import ModelSettings
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.job import BatchSettings, CheckpointSettings, EvalSettings, OptimSettings, TrainJob
from trainer.metrics import read_status
from trainer.train import train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
NAMES = set(re.findall(r"`([^`\n]+)`", PAGE))
SOURCES = "\n".join(path.read_text() for side in ("trainer", "mining") for path in (ROOT / side).rglob("*.py"))
DROPPING = "filters", "share", "rerank"  # modules of mining/table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of both sides: a checkpoint, versions 0 and 1 of the negatives, a swap and evaluations."""
    root = tmp_path_factory.mktemp("monitoring")
    mining = {**make_job(root, num_queries=24), "clusters": {"num": 2}}
    training = TrainJob(
        run=RunSettings(folder=root / "run", trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(write_tiny_encoder(root / "encoder"))),
        batch=BatchSettings(queries=4),
        optim=OptimSettings(steps=3),
        checkpoint=CheckpointSettings(every_steps=1),
        eval=EvalSettings(every_steps=2),
    )
    train(replace(training, optim=OptimSettings(steps=1), negatives=NegativesSettings(per_query=0)), world_of())
    assert run_service(as_job(mining), MPI.COMM_SELF, once=True) == "finished"
    train(training, world_of())
    return root / "run"


def names_in(found, outer=""):
    """Yield the names of all values of a line: of a value with parts, the names of its parts behind an arrow."""
    for name, value in found.items():
        yield from names_in(value, f"{outer}{name} → ") if isinstance(value, dict) else [f"{outer}{name}"]


def lines(run, name):
    return [json.loads(line) for line in (run / "logs" / name).read_text().splitlines()]


def is_named(name):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NAMES)


def test_every_figure_that_a_run_records_is_on_the_page(run):
    recorded = [*lines(run, "metrics.jsonl"), *lines(run, "miner.jsonl")]
    told = [read_status(run, side) for side in ("trainer", "miner")]
    assert {"saved", "negatives swapped", "published", "planned", None} <= {line.get("event") for line in recorded}
    assert any("dev/mrr@10" in line for line in recorded) and all(told)
    found = {name for line in [*recorded, *told] for name in names_in(line)}
    assert len(found) > 90 and sorted(name for name in found if not is_named(name)) == []


def test_every_event_filter_and_gauge_is_on_the_page():
    events = re.findall(r'"event": "([^"]+)"', SOURCES)
    filters = re.findall(
        r'\.narrow\("([^"]+)"', "".join((ROOT / "mining" / "table" / f"{name}.py").read_text() for name in DROPPING)
    )
    margins = [field.name for field in fields(FilterSettings) if field.name.endswith("_margin")]
    assert len(events) >= 7 and len(filters) >= 9 and len(margins) == 3
    assert [name for name in (*events, *filters, *margins, *GAUGES) if name not in NAMES] == []


def test_no_figure_is_on_the_page_that_nothing_records(run):
    recorded = [*lines(run, "metrics.jsonl"), *lines(run, "miner.jsonl"), *(read_status(run, s) for s in ("trainer", "miner"))]
    found = {name for line in recorded for name in names_in(line)} | {line["event"] for line in recorded if "event" in line}
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    of_rows = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    unknown = [name for name in of_rows if not fnmatch.filter(found, name) and not re.search(rf"\b{re.escape(name)}\b", SOURCES)]
    assert len(of_rows) > 60 and unknown == []
