"""A whole refresh against the sum of its bare parts: the encoder on batches made in advance, and one product of all embeddings.

Each turn is a real service on a run folder of its own with nothing encoded yet, from its first phase to a published version.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from launch.bench.bare import batches_of, forward
from launch.bench.machine import tiled_product
from launch.bench.turns import compared, take_turns
from mining.alone import Alone
from mining.job import MineJob
from mining.service import run_service
from mining.settings import MineSettings, SampleSettings, SearchSettings
from trainer.data.datasets import RetrievalData, open_dataset
from trainer.encoder.encode import DTYPES
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.tokens import tokenize_side
from trainer.encoder.topk import tile_shape
from trainer.handoff.manifest import publish_version, write_latest
from trainer.handoff.negatives import negatives_folder
from trainer.handoff.settings import DataSettings, RunSettings
from trainer.handoff.weights import checkpoint_name, checkpoints_folder
from trainer.world import World

TOP_K = 200


@dataclass(frozen=True)
class Corpus:
    """Texts in BEIR's form, each query with one positive, and the model that encodes them."""

    folder: Path
    model: str
    max_tokens: int
    precision: Literal["fp32", "bf16", "fp16"]

    @property
    def data(self) -> DataSettings:
        return DataSettings(path=self.folder / "data", cache=self.folder / "cache")

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings(name=self.model, max_query_tokens=self.max_tokens, max_passage_tokens=self.max_tokens)

    def open(self) -> RetrievalData:
        """Return the texts."""
        return open_dataset(self.data.path, self.data.cache)


def measure_refresh(corpus: Corpus, rounds: int, world: World, has_product: bool = True) -> dict[str, Any]:
    """Return what a refresh takes, and its bare parts, in turn. has_product: one of these is the product of all embeddings."""
    numbers = itertools.count()
    seconds: dict[str, float] = {}
    made = corpus.folder / "made"
    publish_model(corpus, made)

    def refresh() -> None:
        run = corpus.folder / f"run-{next(numbers)}"
        shutil.copytree(made, run, copy_function=os.link)
        seconds.clear()
        seconds.update(mine_once(corpus, run))

    sizes, bare = bare_parts(corpus, world, has_product)
    turns = take_turns({"bare parts": bare, "ours": refresh}, rounds, world)
    found = compared(turns, "bare parts", {})
    return {**sizes, "top_k": TOP_K, "ratio": found["ours"]["ratio"], "sides": found, "phases_s": seconds}


def publish_model(corpus: Corpus, run: Path) -> None:
    """Make a run whose newest checkpoint is the model."""
    encoder, tokenizer, traits = load_encoder(corpus.settings)

    def write(staging: Path) -> None:
        (staging / "encoder").mkdir()
        save_encoder(staging / "encoder", encoder, tokenizer, traits)

    checkpoint = checkpoints_folder(run) / checkpoint_name(1)
    digest = corpus.open().digest
    publish_version(checkpoint, write, {"step": 1, "weights_digest": weights_digest(encoder), "data_digest": digest})
    write_latest(checkpoint.parent, checkpoint.name)


def mine_once(corpus: Corpus, run: Path) -> dict[str, float]:
    """Mine one version from a run's checkpoint, and return the seconds of its phases."""
    job = MineJob(
        run=RunSettings(folder=run),
        data=corpus.data,
        mine=MineSettings(bm25_top_k=0),
        encode=EncodeSettings(dtype=corpus.precision),
        search=SearchSettings(top_k=TOP_K),
        sample=SampleSettings(num_negatives=16),
    )
    run_service(job, Alone(), once=True)
    manifest = json.loads((negatives_folder(run) / "v000001" / "manifest.json").read_text())
    return manifest["seconds"]


def bare_parts(corpus: Corpus, world: World, has_product: bool) -> tuple[dict[str, int], Callable[[], None]]:
    """Return the sizes of both sides, and what does a refresh's arithmetic and nothing else."""
    device, dtype = world.device, DTYPES[corpus.precision]
    data = corpus.open()
    encoder, tokenizer, traits = load_encoder(corpus.settings)
    encoder.eval().to(device)
    tables = [tokenize_side(data, side, tokenizer, traits) for side in ("queries", "corpus")]
    batches = [batches_of(table, encoder, dtype) for table in tables]
    chance = torch.Generator().manual_seed(0)
    rows = [len(table.lengths) if has_product else 0 for table in tables]
    query_QD, passage_ND = (torch.randn(num, encoder.width, generator=chance).to(device) for num in rows)

    def work() -> None:
        for side in batches:
            forward(encoder, side, dtype)
        if has_product:
            tiled_product(query_QD, passage_ND, tile_shape(TOP_K, device.type))

    sizes = {"queries": len(tables[0].lengths), "passages": len(tables[1].lengths)}
    return {**sizes, "tokens": int(sum(table.lengths.sum() for table in tables))}, work


def write_part(path: Path, num_passages: int, folder: Path) -> None:
    """Write the first passages of a data set, and the training queries that have a positive among them, as a data set."""
    data = open_dataset(path, None)
    num_passages = min(num_passages, len(data.corpus))
    train = data.qrels["train"]
    is_in = (train.corpus_rows < num_passages) & (train.scores > 0)
    query_rows = np.unique(train.query_rows[is_in])
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", data.corpus.select(range(num_passages))), ("queries", data.queries.select(query_rows))):
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"_id": text["_id"], "text": text["text"]}) + "\n" for text in texts)
    ids = data.queries["_id"][:], data.corpus["_id"][:]
    pairs = zip(train.query_rows[is_in], train.corpus_rows[is_in], strict=True)
    lines = (f"{ids[0][query]}\t{ids[1][passage]}\t1\n" for query, passage in pairs)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
