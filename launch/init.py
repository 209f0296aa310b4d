"""`negpool init`: measure a data set, and choose for it and this machine what a first job says.

The choices are rules of thumb with their reasons beside them; each is a pure function of what was measured, and the file tells
a person which of them to change next.
"""

import itertools
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.counted import counted
from launch.init_file import Line, job_text
from launch.jobfile import read_job
from launch.shares import LaunchSettings, cores_and_gpus, share_out
from mining.settings import hard_depths
from trainer.data.datasets import RetrievalData, open_data
from trainer.data.split import say_missing
from trainer.encoder.backbone import bare_backbone
from trainer.encoder.model import load_text_rules
from trainer.encoder.opened import describe
from trainer.encoder.settings import ModelSettings
from trainer.encoder.source import refuse_no_name
from trainer.errors import InputError
from trainer.fits import check_sizes
from trainer.handoff.manifest import write_atomically
from trainer.handoff.settings import DataSettings

SAMPLED = 2000  # texts of a side whose lengths are measured
TOKENS_OF_WORD = 1.4  # of English, where no tokenizer is here
LENGTHS = {True: (128, 512), False: (64, 128)}  # most tokens of a query and of a passage; whether there is a GPU
BATCHES = {True: (32, 1024), False: (16, 64)}  # least and most queries of a step
STEPS = {True: 300, False: 60}  # that a first run has at least, if MOST_EPOCHS give as many
MOST_EPOCHS, REFRESHES = 5, 6  # of a small data set; checkpoints to mine in a run
SMALL_MODEL = 50e6  # parameters; smaller ones take a higher learning rate
KEPT_TOKENS = 16384  # of a step on a rank: on a CPU its graphs fit into some GiB


@dataclass(frozen=True)
class Measured:
    """What the choices depend on."""

    data: DataSettings
    model: str
    num_queries: int  # with a positive in the training split
    num_passages: int
    splits: tuple[str, ...]
    query_lengths: tuple[int, int]  # tokens: median, and what 95 % stay below
    passage_lengths: tuple[int, int]
    most_tokens: tuple[int, int]  # of a query and of a passage, as the model has them
    num_parameters: int | None  # None: the model is not here, and lengths were told by words
    cores: int
    num_gpus: int
    run_folder: str


def init_job(settings: DataSettings, model: str, out: Path | None) -> dict[str, Any]:
    """Write a job file for a data set and a model; return its place and settings. Raises InputError, also where there is one."""
    out = out or Path(f"{_stem(settings.path)}.toml")
    if os.path.lexists(out):
        raise InputError(f"{out} is there already, and is not written over; name another file with --out")
    data = open_data(settings, {})
    measured = measure(settings, model, data)
    lines = choose(measured)
    write_atomically(out, job_text(measured, out, lines))
    try:
        jobs = read_job(out, [])
        check_sizes(jobs.train, data, share_out(jobs.launch, measured.cores, ("",) * measured.num_gpus).train_ranks)
    except InputError:
        out.unlink()  # a file that trains nothing is of no use
        raise
    said = say_missing(set(measured.splits), settings.path, settings.columns, settings.train_split)
    return {"job": str(out), "said": said, **{f"{line.section}.{line.key}": line.value for line in lines}}


def measure(settings: DataSettings, model: str, data: RetrievalData) -> Measured:
    """Return what there is in a data set and on this machine."""
    refuse_no_name(model)
    num_queries = len(data.training_queries(settings.train_split))
    if num_queries == 0:
        raise InputError(f"{data.path} has no training query with a positive; negpool data check {data.path} says what it holds")
    try:
        tokenizer, traits = load_text_rules(ModelSettings(name=model))
        num_parameters = _num_parameters(ModelSettings(name=model))
        most = traits.max_query_tokens, traits.max_passage_tokens
    except InputError:  # of the hub, and not downloaded yet
        tokenizer, num_parameters, most = None, None, (512, 512)
    cores, gpus = cores_and_gpus(os.environ)
    return Measured(
        settings, model, num_queries, len(data.corpus), tuple(sorted(data.qrels)),
        _lengths(data.queries, tokenizer), _lengths(data.corpus, tokenizer), most, num_parameters, cores, len(gpus),
        _free_folder(f"runs/{_stem(settings.path)}"),
    )  # fmt: skip


def _lengths(texts: Any, tokenizer: Any) -> tuple[int, int]:
    rows = np.linspace(0, len(texts) - 1, min(SAMPLED, len(texts))).astype(int)
    sample = texts[np.unique(rows)]["text"]
    if tokenizer is None:
        counts = [math.ceil(TOKENS_OF_WORD * len(text.split())) + 2 for text in sample]
    else:
        counts = [len(ids) for ids in tokenizer(sample)["input_ids"]]
    median, most = np.quantile(counts, [0.5, 0.95])
    return math.ceil(median), math.ceil(most)


def _num_parameters(settings: ModelSettings) -> int:
    recorded = describe(settings, with_weights=False)[0]
    return sum(p.numel() for p in bare_backbone(recorded.transformer, settings, **recorded.config_args).parameters())


def choose(found: Measured) -> list[Line]:
    """Return the settings of a first job, each with its reason."""
    on_gpu = found.num_gpus > 0
    shares = share_out(LaunchSettings(train_ranks=min(2, found.cores)), found.cores, ("",) * found.num_gpus)
    ranks = shares.train_ranks
    batch = batch_of(found.num_queries, ranks, on_gpu)
    per_epoch = math.ceil(found.num_queries / batch)
    epochs = min(MOST_EPOCHS, max(1, math.ceil(STEPS[on_gpu] / per_epoch)))
    refresh = refresh_steps(found, batch, ranks / shares.mine_ranks)
    every = interval_of(per_epoch * epochs, refresh)
    lines = [
        Line("run", "folder", found.run_folder, "checkpoints, negatives, logs and the report"),
        *_of_data(found),
        *_of_model(found, on_gpu),
        Line("batch", "queries", batch, f"{per_epoch} steps an epoch; each query sees the passages of all others"),
        *_of_chunk(found, batch, ranks, on_gpu),
        *_of_optim(found, epochs, per_epoch),
        Line("negatives", "per_query", 1, "hard negatives beside those of the batch; 2 to 7 cost more and may bring more"),
        *_of_evaluation(found, every),
        Line("checkpoint", "every_steps", every, f"each is mined, which takes about as long as {counted(refresh, 'step')}"),
        *_of_mining(found),
        *([] if on_gpu else [Line("launch", "train_ranks", ranks, f"of {found.cores} cores; one more rank mines")]),
    ]
    return lines


def _stem(path: Path) -> str:
    return re.split(r"[.:]", path.name)[0] or "data"


def _free_folder(folder: str) -> str:
    """Return a folder that holds nothing: this one, or with a number behind it."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name) or (os.path.isdir(name) and not os.listdir(name)))


def _of_data(found: Measured) -> list[Line]:
    sizes = f"{counted(found.num_queries, 'training query')}, {counted(found.num_passages, 'passage')}"
    lines = [Line("data", "path", str(found.data.path), sizes)]
    given, usual = asdict(found.data), asdict(DataSettings())
    for key in (key for key, value in given.items() if key != "path" and value != usual[key]):
        value = str(given[key]) if isinstance(given[key], Path) else given[key]
        lines.append(Line("data", key, value, "as you gave it"))
    return lines


def batch_of(num_queries: int, num_ranks: int, on_gpu: bool) -> int:
    """Return a power of two that gives a small data set some 40 steps an epoch, within what is usual for the machine."""
    least, most = BATCHES[on_gpu]
    wanted = 2 ** round(math.log2(max(1, num_queries / 40)))
    return max(num_ranks, min(num_queries, min(most, max(least, wanted))))


def refresh_steps(found: Measured, batch: int, trainers_a_miner: float) -> int:
    """Return how many steps take as long as a refresh of the negatives.

    A refresh encodes all texts once; a step encodes its own and goes back through them, three times the work of a pass at least.
    """
    limits = [min(most, limit) for most, limit in zip(found.most_tokens, LENGTHS[found.num_gpus > 0], strict=True)]
    query, passage = min(found.query_lengths[0], limits[0]), min(found.passage_lengths[0], limits[1])
    refresh = found.num_queries * query + found.num_passages * passage
    return math.ceil(trainers_a_miner * refresh / (3 * batch * (query + 2 * passage)))


def interval_of(num_steps: int, steps_of_refresh: int) -> int:
    """Return the steps between two checkpoints: REFRESHES in a run, or fewer where the miner could not follow."""
    return max(2, min(max(2, num_steps // 2), max(math.ceil(num_steps / REFRESHES), steps_of_refresh)))


def _of_model(found: Measured, on_gpu: bool) -> list[Line]:
    how = "" if found.num_parameters else ", told by words: the model is not here yet"
    lines = [Line("model", "name", found.model, "a folder, a name of the hub or a package")]
    sides = (("query", found.query_lengths), ("passage", found.passage_lengths))
    for (side, (median, most)), of_model, limit in zip(sides, found.most_tokens, LENGTHS[on_gpu], strict=True):
        tokens = max(8, min(-(-most // 8) * 8, of_model, limit))
        cut = "" if tokens >= most else "; longer ones are cut, which saves time" if tokens == limit else "; longer ones are cut"
        lines.append(Line("model", f"max_{side}_tokens", tokens, f"median {median}, 95 % up to {most}{how}{cut}"))
    return lines


def _of_chunk(found: Measured, batch: int, ranks: int, on_gpu: bool) -> list[Line]:
    query, passage = (min(pair) for pair in zip(found.most_tokens, LENGTHS[on_gpu], strict=True))
    tokens = batch * (min(query, found.query_lengths[1]) + 2 * min(passage, found.passage_lengths[1])) // ranks
    if on_gpu or tokens > KEPT_TOKENS:
        return []  # a GPU is probed; a CPU encodes 4096 tokens at once, twice
    return [Line("chunk", "keep_graphs", "all", f"{tokens:,} tokens a step and rank fit into memory: one pass less")]


def _of_optim(found: Measured, epochs: int, per_epoch: int) -> list[Line]:
    is_small = found.num_parameters is not None and found.num_parameters < SMALL_MODEL
    size = "a model of any size" if found.num_parameters is None else f"{found.num_parameters / 1e6:,.1f} million parameters"
    why = f"usual for {size}; half of it, if dev falls"
    return [
        Line("optim", "lr", 1e-4 if is_small else 2e-5, why),
        Line("optim", "epochs", epochs, f"{per_epoch * epochs} steps in all"),
    ]


def _of_evaluation(found: Measured, every: int) -> list[Line]:
    splits = set(found.splits) - {found.data.train_split}
    split = next((name for name in ("test", "dev") if name in splits), None)
    if split is None:
        return [Line("eval", "split", "test", "no such queries, nothing is evaluated: negpool data split DATA OUT makes some")]
    lines = [Line("eval", "split", split, "before the first step and after the last, beside BM25")]
    if split != "dev" and "dev" in splits:
        lines.append(Line("eval", "every_steps", every, "on dev, at the checkpoints: the best one on dev is kept"))
    return lines


def _of_mining(found: Measured) -> list[Line]:
    top_k, negatives = hard_depths(found.num_passages)
    lines = [
        Line("search", "top_k", top_k, "candidates of a query; most of a small corpus would be no hard negatives"),
        Line("sample", "num_negatives", negatives, "kept of them; each step draws negatives.per_query"),
    ]
    if top_k < 50:
        lines.append(Line("mine", "bm25_top_k", top_k, "candidates of version 0, which BM25 finds before there is a checkpoint"))
    return lines
