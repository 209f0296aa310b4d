"""`negpool mine` without a run or after one: mines with any model, writes a version to a file, shows one query of it."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.agree import check_mpi_world
from launch.counted import counted
from launch.early import check_early, is_launched
from launch.imports import lasting_imports
from launch.jobfile import Jobs, Override, name_of, read_job
from launch.mine_progress import followed
from launch.options import Asked
from launch.output import messages, start_logging
from launch.sides import stop_without_parent

if TYPE_CHECKING:
    from mpi4py import MPI

    from mining.alone import Alone
    from mining.job import MineJob
    from mining.offline import Mined

log = logging.getLogger(__name__)

OF_VERSIONS = ("mining.service", "mining.refresh", "trainer.encoder.model")
OF_PLANS = ("mining.work", "mining.disk", "mining.find.source")  # of which a person needs the warnings
HUSHED = dict.fromkeys(OF_VERSIONS, logging.ERROR) | dict.fromkeys(OF_PLANS, logging.WARNING)


NO_LIMIT = 1 << 31  # candidates


class Stopped(Exception):
    """The miner was asked to stop before there was anything to write."""


def mine_model(job_file: Path | None, overrides: list[str], model: str, wanted: Asked) -> dict[str, Any] | None:
    """Mine, and return what was written, and what there is of the query to show; None but on rank 0.

    model: a model, a folder of vectors, or "bm25".
    Raises Stopped on every rank if one was asked to stop. Collective over MPI's world.
    """
    jobs = read_to_mine(job_file, overrides)
    if not is_launched():
        check_early(jobs, trains=False)
    with lasting_imports():
        from mpi4py import MPI

        import mining.service  # noqa: F401 - which is needed below

    world = MPI.COMM_WORLD
    start_logging(world.rank)
    stop_without_parent()
    check_mpi_world(world.size, os.environ, MPI.Get_library_version().split(",")[0])
    with mined_offline(jobs, model, world, wanted) as mined:
        return None if mined is None else {"model": model, **_told(mined, wanted)}


def read_to_mine(job_file: Path | None, overrides: Sequence[Override]) -> Jobs:
    """Return the jobs by which a model mines: how many candidates a query has is left to `fit_depths`, where nobody says it.

    A run's defaults would be refused beside more negatives than they have candidates.
    """
    settings = read_job(job_file, [each for each in overrides if name_of(each) != "sample.num_negatives"])
    depths = {"search.top_k", "mine.bm25_top_k"} - settings.given
    jobs = read_job(job_file, [*overrides, *((name, NO_LIMIT) for name in depths)])
    return replace(jobs, given=jobs.given - depths)


@contextlib.contextmanager
def mined_offline(jobs: Jobs, model: str, world: "MPI.Comm | Alone", wanted: Asked | None = None) -> Iterator["Mined | None"]:
    """Yield what a model mines, in a folder that is deleted afterwards; None but on rank 0.

    wanted: a file and a query that are asked for; what is wrong with them is found before the mining.
    Raises Stopped on every rank if one was asked to stop. Collective over the world.
    """
    from mining.offline import offline_run, read_mined
    from mining.ranks import Ranks
    from mining.service import run_service

    job, settings, shards = Ranks(world, lambda: False).decide(lambda: _look(jobs, model, wanted))
    with _hushed(), offline_run(job, settings, shards, world) as job:
        with followed(job.run.folder, messages()) if world.rank == 0 else contextlib.nullcontext():
            how = run_service(job, world, once=True)
        if how == "stopped":
            if world.rank == 0:
                log.info("stopped: nothing is written, and the same command goes on with what is encoded")
            raise Stopped
        yield read_mined(job) if world.rank == 0 else None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep back what speaks of versions, steps and what becomes of a saved model, which a person who only mines never meets.

    Why nothing came of it is the error.
    """
    levels = {name: logging.getLogger(name).level for name in HUSHED}
    for name, level in HUSHED.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def read_newest(job_file: Path, overrides: list[str], wanted: Asked) -> dict[str, Any]:
    """Write the newest version of a run to a file, or look up a query in it, or both; return what was found."""
    jobs = read_job(job_file, overrides)
    from mining.offline import read_mined
    from trainer.data.record_file import refuse_file

    start_logging()
    if wanted.out is not None:
        refuse_file(wanted.out)
    return _told(read_mined(jobs.mine), wanted)


def _look(jobs: Jobs, model: str, wanted: Asked | None) -> tuple["MineJob", Any, Path | None]:
    """Return the job, what is named on the command line, as `offline_run` takes it, and where its embeddings are kept.

    Raises InputError for what would only be found out after the mining.
    """
    from launch.named import as_it_is, locate_model
    from mining.export import no_scores
    from mining.find.supplied import holds_vectors
    from mining.offline import fit_depths
    from mining.show import find_query
    from mining.table.judgements import read_judgements
    from trainer.data.datasets import open_data
    from trainer.data.record_file import refuse_file

    if wanted is not None and wanted.out is not None:
        refuse_file(wanted.out)
        if wanted.scores and model == "bm25" and not jobs.mine.rerank.model:
            raise no_scores()
    data = open_data(jobs.mine.data, jobs.mine.sources)
    judgements = read_judgements(data, jobs.mine.data.train_split)
    if wanted is not None and wanted.show is not None:
        find_query(data, judgements, wanted.show)
    job = fit_depths(jobs.mine, jobs.given, data, judgements)
    if not {"search.top_k", "filter.range_max"} & jobs.given:
        depth = job.mine.bm25_top_k if model == "bm25" else job.search.top_k
        why = f"which suits {counted(len(data.corpus), 'passage')}; --range-max sets another number"
        log.info("negatives come from the %s nearest passages of each query, %s", f"{depth:,}", why)
    if job.rerank.model and (job.rerank.margin, job.rerank.max_score) == ("off", "off"):
        log.info("the cross-encoder's scores are written and drop nothing; --cross-encoder-margin says what they drop")
    if model == "bm25":
        return job, None, None
    if holds_vectors(Path(model)):
        return job, Path(model), None
    folder, shards = locate_model(model, data.cache)
    return job, as_it_is(jobs.train.model, folder), shards


def _told(mined: "Mined", wanted: Asked) -> dict[str, Any]:
    """Return what there is of the query to show, and write the file that is asked for."""
    from mining.export import write_negatives
    from mining.show import show_query

    data, negatives, out, form = mined.data, mined.negatives, wanted.out, wanted.form
    shown = {} if wanted.show is None else show_query(data, mined.judgements, negatives, wanted.show)
    if out is None:
        return shown
    manifest = negatives.manifest
    num_each = manifest["sample"]["num_negatives"]
    return shown | {
        "out": str(out),
        "form": form,
        **write_negatives(out, form, data, mined.judgements, negatives, wanted.scores),
        "data": str(data.path),
        "num_queries": negatives.num_queries,
        "num_passages": len(data.corpus),
        "num_negatives": len(negatives.ids),
        "num_negatives_each": num_each,
        "top_k": manifest["search"]["top_k"],
        "num_short_rows": int((np.diff(negatives.indptr) < num_each).sum()),
        "num_empty_rows": manifest["num_empty_rows"],
        "counts": manifest["counts"],
        "dropped": manifest["filter"]["dropped"],
        "clusters": manifest["clusters"],
        "audit": manifest["audit"],
        "seconds": manifest["seconds"],
    }
