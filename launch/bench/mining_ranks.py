"""What `negpool bench mining` measures in MPI processes: two ranks against one, and a service's memory against its plan."""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bench.machine import peak_resident_bytes, tiled_product
from launch.ranks import answer
from mining.find.embeddings import Embeddings, encode_together
from mining.find.search import ExactFinder, best_of_ranks
from mining.job import MineJob
from mining.memory import GIB, QUERY_TILE
from mining.ranks import Ranks
from mining.service import run_service
from mining.settings import MineSettings
from trainer.data.datasets import open_dataset
from trainer.encoder.missing import Texts
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest
from trainer.encoder.shards import Shards, open_shards
from trainer.encoder.tokens import tokenize, tokenize_side
from trainer.encoder.topk import tile_shape
from trainer.handoff.manifest import publish_version, write_latest
from trainer.handoff.settings import DataSettings, RunSettings
from trainer.handoff.weights import checkpoint_name, checkpoints_folder

TEXT_SHARD, PASSAGE_SHARD, WIDTH, TOP_K = 16, 8192, 384, 200
PASSAGES_OF_QUERY = 100  # of the corpus whose memory is measured
ENCODED_SHARDS = 2  # that the service encodes; the others are random numbers when it begins


def measure(what: str, **arguments: Any) -> dict[str, Any] | None:
    """Return the figures on rank 0, None elsewhere. Collective over the MPI world."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    found = _ranks(comm, **arguments) if what == "ranks" else _memory(comm, **arguments)
    return found if comm.rank == 0 else None


def _ranks(
    comm, data: str, model: str, rounds: int, num_texts: int, max_tokens: int, num_queries: int, num_passages: int
) -> dict[str, Any]:
    """Time the same work by rank 0 alone, the others asleep, and by all ranks, in turn. Collective."""
    everybody = Ranks(comm, lambda: False)
    alone = Ranks(comm.Split(comm.rank), lambda: False)
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=model, max_passage_tokens=max_tokens))
    corpus = open_dataset(Path(data), None).corpus
    chosen = np.linspace(0, len(corpus) - 1, num_texts).astype(int).tolist()
    tokens = everybody.together(lambda: tokenize(corpus.select(chosen), tokenizer, prefix="", max_tokens=max_tokens))
    passages = Shards(folder / "passages", num_passages, PASSAGE_SHARD)
    everybody.decide(lambda: _write_random(passages))
    embeddings = Embeddings(passages)
    allowed_N = np.ones(num_passages, bool)
    query_QD = np.random.default_rng(1).standard_normal((num_queries, WIDTH), np.float32)

    def encode(ranks: Ranks, turn: str) -> None:
        shards = Shards(folder / turn, num_texts, TEXT_SHARD)
        ranks.decide(lambda: shards.folder.mkdir(exist_ok=True))
        encode_together(ranks, [Texts(shards, encoder, tokens)], lambda done, total: None)

    def search(ranks: Ranks, turn: str) -> None:
        finder = ExactFinder(slice(0, num_queries), torch.from_numpy(query_QD), TOP_K, PASSAGE_SHARD, allowed_N, "cpu")
        for shard in range(ranks.rank, passages.num_shards, ranks.num_ranks):
            finder.see(shard, embeddings.shard(shard))
            embeddings.let_go(shard)
        for start in range(0, num_queries, QUERY_TILE):
            best_of_ranks(ranks, finder, slice(start, min(start + QUERY_TILE, num_queries)))

    def product(ranks: Ranks, turn: str) -> None:
        for shard in range(ranks.rank, passages.num_shards, ranks.num_ranks):
            tiled_product(torch.from_numpy(query_QD), torch.tensor(embeddings.shard(shard)), tile_shape(TOP_K, "cpu"))

    works: dict[str, Callable[[Ranks, str], None]] = {"encode": encode, "search": search, "bare product": product}
    speedups: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            everybody.meet()
            seconds = []
            for ranks in (alone, everybody):
                started = time.perf_counter()
                if ranks is everybody or comm.rank == 0:
                    work(ranks, f"{name}-{number}-{ranks.num_ranks}")
                seconds.append(time.perf_counter() - started)  # when all are through: the work ends together
                everybody.meet()
            if number:  # the first call loads what it needs
                speedups[name].append(seconds[0] / seconds[1])
    everybody.decide(lambda: shutil.rmtree(folder, ignore_errors=True))
    medians = {name: round(statistics.median(turns), 3) for name, turns in speedups.items()}
    return {"ranks": comm.size, "threads_of_a_rank": 1, "speedup": medians}


def _write_random(shards: Shards, width: int = WIDTH, first: int = 0) -> None:
    shards.folder.mkdir(parents=True, exist_ok=True)
    for shard in range(first, shards.num_shards):
        rows = shards.rows(shard)
        vectors = np.random.default_rng(shard).standard_normal((len(rows), width), np.float32)
        shards.publish(shard, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def prepare_service(folder: Path, model: str, passages: int) -> None:
    """Make what a service finds: short texts, their tokens, a checkpoint, and random shards but for the first.

    In another process than the service's, whose memory is then its own.
    """
    run, data, cache = folder / "run", _write_texts(folder / "data", passages), folder / "cache"
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=model))
    texts, digest = open_dataset(data, cache), weights_digest(encoder)

    def write(staging: Path) -> None:
        (staging / "encoder").mkdir()
        save_encoder(staging / "encoder", encoder, tokenizer, traits)

    checkpoint = checkpoints_folder(run) / checkpoint_name(1)
    publish_version(checkpoint, write, {"step": 1, "weights_digest": digest, "data_digest": texts.digest})
    write_latest(checkpoint.parent, checkpoint.name)
    loaded, tokenizer, traits = load_encoder(ModelSettings(name=str(checkpoint / "encoder")))
    table = tokenize_side(texts, "corpus", tokenizer, traits)
    _write_random(open_shards(run / "shards", digest, traits.pooling, table, loaded, "passage"), loaded.width, ENCODED_SHARDS)


def _memory(comm, folder: str) -> dict[str, Any]:
    """Return the planned and the largest resident memory of a service in the folder that `prepare_service` made."""
    run, data = Path(folder) / "run", DataSettings(path=Path(folder) / "data", cache=Path(folder) / "cache")
    job = MineJob(run=RunSettings(folder=run), data=data, mine=MineSettings(bm25_top_k=0))
    run_service(job, comm, once=True)
    peak = peak_resident_bytes() / GIB
    records = [json.loads(line) for line in (run / "logs" / "miner.jsonl").read_text().splitlines()]
    planned = next(record for record in records if record.get("event") == "planned")
    return {
        "planned_gib": planned["total_gib"],
        "peak_gib": round(peak, 4),
        "ratio": round(peak / planned["total_gib"], 3),
        "plan": {key: planned[key] for key in ("held_gib", "phases_gib", "query_pass", "query_tile")},
    }


def _write_texts(folder: Path, num_passages: int) -> Path:
    (folder / "qrels").mkdir(parents=True)
    num_queries = max(16, num_passages // PASSAGES_OF_QUERY)
    for name, count in (("corpus", num_passages), ("queries", num_queries)):
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(f'{{"_id": "{row}", "title": "", "text": "{row % 997}"}}\n' for row in range(count))
    lines = (f"{row}\t{row}\t1\n" for row in range(num_queries))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


if __name__ == "__main__":
    answer(measure)
