"""`negpool mine` without a run or after one: mines with any model, writes a version to a file, shows one query of it."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from launch.agree import check_mpi_world
from launch.counted import counted
from launch.early import check_early, is_launched
from launch.imports import lasting_imports
from launch.jobfile import Jobs, read_job
from launch.output import messages, redraws, start_logging
from launch.phases import clock
from launch.sides import stop_without_parent
from launch.tables import Sheet, as_text
from trainer.handoff.heartbeat import beating
from trainer.metrics import read_status

if TYPE_CHECKING:
    from mpi4py import MPI

    from mining.alone import Alone
    from mining.job import MineJob
    from mining.offline import Mined

log = logging.getLogger(__name__)

EXCERPT_LINES = 8
LOOK_EVERY_S, SAY_EVERY_S = 0.5, 15.0  # the second where there is no terminal to redraw


class Stopped(Exception):
    """The miner was asked to stop before there was anything to write."""


def mine_model(
    job_file: Path | None, overrides: list[str], model: str, out: Path | None, form: str, show: str | None
) -> dict[str, Any] | None:
    """Mine, and return what was written, and what there is of the query to show; None but on rank 0.

    model: a model, a folder of vectors, or "bm25".
    Raises Stopped on every rank if one was asked to stop. Collective over MPI's world.
    """
    jobs = read_job(job_file, overrides)
    if not is_launched():
        check_early(jobs, trains=False)
    with lasting_imports():
        from mpi4py import MPI

        import mining.service  # noqa: F401 - which is needed below

    world = MPI.COMM_WORLD
    start_logging(world.rank)
    stop_without_parent()
    check_mpi_world(world.size, os.environ, MPI.Get_library_version().split(",")[0])
    with mined_offline(jobs, model, world, out, show) as mined:
        return None if mined is None else {"model": model, **_told(mined, out, form, show)}


@contextlib.contextmanager
def mined_offline(
    jobs: Jobs, model: str, world: "MPI.Comm | Alone", out: Path | None = None, show: str | None = None
) -> Iterator["Mined | None"]:
    """Yield what a model mines, in a folder that is deleted afterwards; None but on rank 0.

    out, show: a file and a query that are asked for; what is wrong with them is found before the mining.
    Raises Stopped on every rank if one was asked to stop. Collective over the world.
    """
    from mining.offline import offline_run, read_mined
    from mining.ranks import Ranks
    from mining.service import run_service

    job, settings, shards = Ranks(world, lambda: False).decide(lambda: _look(jobs, model, out, show))
    with _hushed(), offline_run(job, settings, shards, world) as job:
        with _followed(job.run.folder, messages()) if world.rank == 0 else contextlib.nullcontext():
            how = run_service(job, world, once=True)
        if how == "stopped":
            raise Stopped
        yield read_mined(job) if world.rank == 0 else None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep back what speaks of versions, steps and what becomes of a saved model, which a person who only mines never meets.

    Why nothing came of it is the error.
    """
    levels = {name: logging.getLogger(name).level for name in ("mining.service", "mining.refresh", "trainer.encoder.model")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def read_newest(job_file: Path, overrides: list[str], out: Path | None, form: str, show: str | None) -> dict[str, Any]:
    """Write the newest version of a run to a file, or look up a query in it, or both; return what was found."""
    jobs = read_job(job_file, overrides)
    from mining.offline import read_mined
    from trainer.data.record_file import refuse_file

    start_logging()
    if out is not None:
        refuse_file(out)
    return _told(read_mined(jobs.mine), out, form, show)


def written_parts(found: dict[str, Any]) -> Group:
    """Return what was mined as tables."""
    candidates = found["counts"]["candidates"]
    rows = [
        (f"candidates, up to {found['top_k']} of each query", candidates),
        *((f"dropped: {name}", number) for name, number in found["dropped"].items()),
    ]
    sheet = Sheet(
        f"{counted(found['num_queries'], 'query')}, {counted(found['num_passages'], 'passage')}",
        ("", "number", "of the candidates"),
        [(name.replace("_", " "), f"{number:,}", f"{number / max(1, candidates):.1%}") for name, number in rows],
    )
    counts, audit = found["counts"], found["audit"]
    drawn = [("negatives", found["num_negatives"]), ("of them random passages", counts.get("random", 0))]
    drawn += [
        ("random passages drawn again: a rule dropped the first", counts.get("redrawn", 0)),
        ("places that stay empty: rules dropped all that were drawn", counts.get("unfilled", 0)),
        ("queries without any that passed", counts["queries_without"]),
        ("queries without negatives", found["num_empty_rows"]),
    ]
    columns = ["negatives", *(["positives"] if audit["positive_scores"] else [])]
    scores = zip(*(audit[name].items() for name in ("scores", "positive_scores") if audit[name]), strict=True)
    quantiles = [(f"{int(each[0][0][1:])} %", *(f"{value:.3f}" for _, value in each)) for each in scores]
    times = ", ".join(f"{name} {clock(seconds)}" for name, seconds in found["seconds"].items() if seconds >= 1)
    parts = [sheet, Sheet("drawn", ("", "number"), [(name, f"{number:,}") for name, number in drawn])]
    parts += [Sheet("quantiles of scores", ("", *columns), quantiles)] if quantiles else []
    ends = [f"Recall of the index: {audit['recall']:.3f}."] if audit["recall"] is not None and audit["recall"] < 1 else []
    ends += [f"Time: {times}."] if times else []
    return as_text([*parts, *ends, *found["said"], f"{found['out']}: {found['records']:,} records, form {found['form']}."])


def shown_parts(found: dict[str, Any]) -> Group:
    """Return a query, its positives and its negatives, each with its scores."""
    source = "BM25" if found["source"] == "bm25" else f"the checkpoint of step {found['checkpoint_step']}"
    source = source if found["checkpoint_step"] or found["source"] == "bm25" else "the model"
    cluster = f", cluster {found['cluster']}" if "cluster" in found else ""
    lines = [Text(f"query {found['query_id']}  (scores of {source}{cluster})", style="bold"), Text(found["query"] + "\n")]
    best = max((passage["score"] for passage in found["positives"] if "score" in passage), default=None)
    for kind, style in (("positive", "green"), ("negative", "red")):
        for number, passage in enumerate(found[f"{kind}s"], 1):
            scores = [f"{name.replace('_', ' ')} {passage[name]:.3f}" for name in ("score", "teacher_score") if name in passage]
            above = ["above the best positive"] if kind == "negative" and best is not None and passage["score"] >= best else []
            lines.append(Text(f"{kind} {number}: {passage['id']}   " + "   ".join([*scores, *above]), style=f"bold {style}"))
            lines.append(Text(_excerpt(passage["text"]) + "\n", style="dim" if kind == "negative" else ""))
    if not found["negatives"]:
        lines.append(Text("no negatives: nothing passed the filters"))
    return Group(*lines)


def _excerpt(text: str) -> str:
    lines = text.strip().splitlines()
    rest = len(lines) - EXCERPT_LINES
    return "\n".join([*lines[:EXCERPT_LINES], *([f"… {rest} more lines"] if rest > 0 else [])])


def _look(jobs: Jobs, model: str, out: Path | None, show: str | None) -> tuple["MineJob", Any, Path | None]:
    """Return the job, what is named on the command line, as `offline_run` takes it, and where its embeddings are kept.

    Raises InputError for what would only be found out after the mining.
    """
    from launch.named import as_it_is, locate_model
    from mining.find.supplied import holds_vectors
    from mining.offline import fit_depths
    from mining.show import find_query
    from mining.table.judgements import read_judgements
    from trainer.data.datasets import open_data
    from trainer.data.record_file import refuse_file

    if out is not None:
        refuse_file(out)
    data = open_data(jobs.mine.data, jobs.mine.sources)
    if show is not None:
        find_query(data, read_judgements(data, jobs.mine.data.train_split), show)
    job = fit_depths(jobs.mine, jobs.given, len(data.corpus))
    if "search.top_k" not in jobs.given:
        depth = job.mine.bm25_top_k or job.search.top_k if model == "bm25" else job.search.top_k
        why = f"which suits {counted(len(data.corpus), 'passage')}; search.top_k sets another number"
        log.info("each query gets %s, %s", counted(depth, "candidate"), why)
    if model == "bm25":
        return job, None, None
    if holds_vectors(Path(model)):
        return job, Path(model), None
    folder, shards = locate_model(model, data.cache)
    return job, as_it_is(jobs.train.model, folder), shards


def _told(mined: "Mined", out: Path | None, form: str, show: str | None) -> dict[str, Any]:
    """Return what there is of the query to show, and write the file that is asked for."""
    from mining.export import write_negatives
    from mining.show import show_query

    data, negatives = mined.data, mined.negatives
    shown = {} if show is None else show_query(data, mined.judgements, negatives, show)
    if out is None:
        return shown
    manifest = negatives.manifest
    return shown | {
        "out": str(out),
        "form": form,
        **write_negatives(out, form, data, mined.judgements, negatives),
        "data": str(data.path),
        "num_queries": negatives.num_queries,
        "num_passages": len(data.corpus),
        "num_negatives": len(negatives.ids),
        "top_k": manifest["search"]["top_k"],
        "num_empty_rows": manifest["num_empty_rows"],
        "counts": manifest["counts"],
        "dropped": manifest["filter"]["dropped"],
        "clusters": manifest["clusters"],
        "audit": manifest["audit"],
        "seconds": manifest["seconds"],
    }


@contextlib.contextmanager
def _followed(run: Path, console: Console) -> Iterator[None]:
    """Tell what the service says in its status file: one live line in a terminal, else a line for each phase."""
    started, said, said_at = time.monotonic(), "", 0.0

    def follow() -> None:
        nonlocal said, said_at
        status = read_status(run, "miner")
        phase, total = status.get("phase", "starting"), status.get("total")
        line = f"{clock(time.monotonic() - started)}  {phase}" + (f"  {status.get('done') or 0:,}/{total:,}" if total else "")
        if redraws(console):
            show.update(line)
        elif phase != said or time.monotonic() - said_at > SAY_EVERY_S:
            said, said_at = phase, time.monotonic()
            console.print(line, markup=False)

    with console.status("starting") as show, beating(follow, LOOK_EVERY_S):
        yield
