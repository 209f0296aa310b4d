"""Mining with a model that is there already, without any run.

The model becomes the one checkpoint of a run folder of its own, and the service makes one version from it: so all of its
settings, ranks, refusals and shards are the same here. The folder goes at the end; embeddings stay with the others of the
data set, and the next call finds them. The price is a copy of the model's weights on disk while it works.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mining.find.supplied import VECTORS, hash_vectors
from mining.job import ALL_ENCODINGS, MineJob
from mining.publish import last_version
from mining.ranks import Ranks
from mining.settings import MineSettings, hard_depths
from mining.table.judgements import Judgements, read_judgements
from trainer.data.datasets import RetrievalData, open_data
from trainer.encoder.model import load_encoder, save_encoder, weights_digest
from trainer.encoder.settings import ModelSettings
from trainer.errors import InputError
from trainer.handoff.claim import is_claimed
from trainer.handoff.manifest import MANIFEST, publish_version, versions, write_latest
from trainer.handoff.negatives import Negatives, negatives_folder
from trainer.handoff.rights import unreadable
from trainer.handoff.settings import NegativesSettings
from trainer.handoff.weights import checkpoint_name, checkpoints_folder
from trainer.metrics import read_status

if TYPE_CHECKING:
    from mpi4py import MPI

    from mining.alone import Alone

PREFIX = "mine-"
CLAIMED_AFTER_S = 3600.0  # a service claims its folder within minutes of its making


@dataclass(frozen=True)
class Mined:
    """A version with the data that it is about."""

    data: RetrievalData
    judgements: Judgements
    negatives: Negatives


@contextlib.contextmanager
def offline_run(
    job: MineJob, model: ModelSettings | Path | None, shards: Path | None, comm: "MPI.Comm | Alone"
) -> Iterator[MineJob]:
    """Yield the job with a run folder of its own, of which the model is the checkpoint; the folder is deleted afterwards.

    model: what is mined with: a model, a folder of vectors (see vectors.py), or None: BM25.
    shards: where embeddings are kept; None: with the data set's tables.
    Raises InputError for data or a model that cannot be read. Collective.
    """
    ranks = Ranks(comm, lambda: False)
    run = ranks.decide(lambda: _make_run(job, model, shards))
    words = (job.mine.bm25_top_k or 50) if model is None else 0
    mine = replace(job.mine, bm25_top_k=words, keep_encodings=ALL_ENCODINGS)
    try:
        yield replace(job, run=replace(job.run, folder=run), mine=mine, negatives=NegativesSettings())
    finally:
        if ranks.speaks:
            shutil.rmtree(run, ignore_errors=True)


def fit_depths(job: MineJob, given: Set[str], data: RetrievalData, judgements: Judgements) -> MineJob:
    """Return the job with as many candidates as suit a corpus and filter.range_max, where search.top_k is not given.

    The default is for large corpora: most of so many candidates in a small one would be no hard negatives. given: settings that
    the job says. Raises InputError for more negatives than there can be.
    """
    num_passages, first, last = len(data.corpus), job.filter.range_min, job.filter.range_max
    depth, num_negatives = hard_depths(num_passages)
    if "sample.num_negatives" in given:
        _refuse_too_many(job, data)
        num_negatives = job.sample.num_negatives
    num_judged = int(np.diff(judgements.judged_indptr).max(initial=0))  # they take places among the nearest
    depth = min(num_passages, max(depth, num_negatives + num_judged) + first)
    words = min(depth, max(MineSettings().bm25_top_k, num_negatives + num_judged) + first)
    if last != "off":
        num_negatives = min(num_negatives, last - first)
        # A text that comes again takes a place, too.
        num_repeats = num_passages - len(np.unique(data.text_keys["corpus"]))
        depth = words = min(num_passages, last + num_judged + min(num_repeats, last))
    if "search.top_k" in given:
        depth, num_negatives = job.search.top_k, job.sample.num_negatives
    return replace(
        job,
        search=replace(job.search, top_k=depth),
        sample=replace(job.sample, num_negatives=num_negatives),
        mine=replace(job.mine, bm25_top_k=job.mine.bm25_top_k if "mine.bm25_top_k" in given else max(words, num_negatives)),
    )


def _refuse_too_many(job: MineJob, data: RetrievalData) -> None:
    """Raise InputError where so many negatives cannot be."""
    wanted, first, last = job.sample.num_negatives, job.filter.range_min, job.filter.range_max
    if wanted > len(data.corpus):
        raise InputError(
            f"sample.num_negatives={wanted} is more than the {len(data.corpus):,} passages of {data.path}; set it lower"
        )
    if last != "off" and wanted > last - first:
        raise InputError(
            f"sample.num_negatives={wanted} is more than the {last - first} places from filter.range_min={first} to "
            f"filter.range_max={last}; set it lower, or filter.range_max higher"
        )


def read_mined(job: MineJob) -> Mined:
    """Return the newest version of a run; raises InputError if there is none, with the reason."""
    data = open_data(job.data, job.sources)
    judgements = read_judgements(data, job.data.train_split)
    negatives = last_version(job.run.folder, judgements.num_queries, len(data.corpus))
    if negatives is None:
        there = (folder / MANIFEST for folder in versions(negatives_folder(job.run.folder)))
        if (told := next(filter(None, map(unreadable, there)), None)) is not None:
            raise InputError(told)
        refused = read_status(job.run.folder, "miner").get("refused", "")
        # The service speaks of a checkpoint, which a person who has only a model never made.
        raise InputError(
            refused.removeprefix(f"checkpoint {checkpoint_name(0)}: ")
            or f"{job.run.folder} has no negatives for this data; negpool mine JOB.toml --once makes some"
        )
    if negatives.manifest.get("data_digest", data.digest) != data.digest:
        raise InputError(f"the negatives in {job.run.folder} are not of {data.path}; set data.path or run.folder")
    return Mined(data, judgements, negatives)


def _make_run(job: MineJob, model: ModelSettings | Path | None, shards: Path | None) -> Path:
    data = open_data(job.data, job.sources)
    clean_left(data.cache)
    run = Path(tempfile.mkdtemp(prefix=PREFIX, dir=data.cache))
    try:
        if isinstance(model, Path):
            _publish(
                run, {"weights_digest": hash_vectors(model, data), "data_digest": data.digest, VECTORS: str(model.resolve())}
            )
        elif model is not None:
            _publish_model(run, model, data.digest)
        kept = shards or data.cache / "shards"
        kept.mkdir(parents=True, exist_ok=True)
        (run / "shards").symlink_to(kept.resolve())
    except BaseException:
        shutil.rmtree(run)
        raise
    return run


def clean_left(cache: Path) -> None:
    """Delete the folders of miners that were killed: those old enough to have been claimed by a service, and without one now."""
    for run in cache.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - run.stat().st_mtime > CLAIMED_AFTER_S and not is_claimed(run, "miner"):
                shutil.rmtree(run, ignore_errors=True)


def _publish_model(run: Path, model: ModelSettings, data_digest: str) -> None:
    encoder, tokenizer, traits = load_encoder(model)

    def write(folder: Path) -> None:
        (folder / "encoder").mkdir()
        save_encoder(folder / "encoder", encoder, tokenizer, traits, origin={"base": model.name})

    _publish(run, {"weights_digest": weights_digest(encoder), "data_digest": data_digest}, write)


def _publish(run: Path, fields: dict[str, str], write: Callable[[Path], None] = lambda _: None) -> None:
    folder = checkpoints_folder(run) / checkpoint_name(0)
    publish_version(folder, write, {"step": 0, **fields})
    write_latest(folder.parent, folder.name)
