"""How much resident memory a large data set takes: `python -m tests.trainer.data.memory FOLDER NUM_PASSAGES`.

Writes a synthetic data set in BEIR's form, builds its tables in one process, and in another opens them, finds its tokens,
orders an epoch and collates batches. Prints one JSON object: seconds, and mebibytes of growth since the imports.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from tests.tiny import VOCABULARY, write_tiny_encoder

NUM_BATCHES, BATCH = 50, 256
WORDS = np.array(VOCABULARY[5:])


def write_large_dataset(folder: Path, num_passages: int) -> Path:
    """Write passages of 20 to 60 words, and a query with one positive for every fourth of them."""
    draw = np.random.default_rng(0)
    phrases = [" ".join(draw.choice(WORDS, length)) for length in draw.integers(10, 30, size=5000)]
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as corpus:
        for number, (first, second) in enumerate(draw.integers(len(phrases), size=(num_passages, 2)).tolist()):
            corpus.write(f'{{"_id": "d{number}", "title": "", "text": "{phrases[first]} {phrases[second]}"}}\n')
    with open(folder / "queries.jsonl", "w") as queries, open(folder / "qrels" / "train.tsv", "w") as qrels:
        for number, which in enumerate(draw.integers(len(phrases), size=num_passages // 4).tolist()):
            queries.write(f'{{"_id": "q{number}", "text": "{phrases[which][:40]}"}}\n')
            qrels.write(f"q{number}\td{4 * number}\t1\n")
    write_tiny_encoder(folder / "encoder")
    return folder


def use(folder: Path) -> dict[str, float]:
    """Open the data, find its tokens and collate batches; return seconds and growth by part."""
    import torch
    from transformers import AutoTokenizer

    from trainer.data.cache import tables_asked_for
    from trainer.data.collate import RowEncoder, collate, training_set
    from trainer.data.datasets import open_dataset
    from trainer.data.sampler import global_batch
    from trainer.encoder.model import Traits
    from trainer.encoder.tokens import tokenize_side
    from trainer.world import keep_freed_memory

    keep_freed_memory()  # as a trainer does
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    tokenizer(["warm up"], return_tensors="pt")
    process, started = psutil.Process(), time.perf_counter()
    before = process.memory_info()
    limits = {"max_query_tokens": 32, "max_passage_tokens": 64}
    traits = Traits(pooling="mean", normalize=True, query_prefix="", passage_prefix="", **limits)
    with tables_asked_for() as tables:
        data = open_dataset(folder, folder / "cache")
        queries, passages = (tokenize_side(data, side, tokenizer, traits) for side in ("queries", "corpus"))
    dataset = training_set(data, "train", queries.select(data.training_queries()), passages)
    opened_s = time.perf_counter() - started
    for step in range(NUM_BATCHES):
        rows = global_batch(0, step, dataset.num_queries, BATCH)
        batch = collate(dataset, None, rows, RowEncoder(print, torch.device("cpu")), per_query=0, seed=0, step=step)
        batch.towers[0].load(torch.arange(len(batch.keys)))
    after = process.memory_info()
    return {
        "passages": len(data.corpus),
        "tables": len(tables),
        "tables_made": sum(table.made for table in tables),
        "open_s": round(opened_s, 2),
        "batch_ms": round((time.perf_counter() - started - opened_s) / NUM_BATCHES * 1000, 1),
        "growth_mib": round((after.rss - before.rss) / 2**20, 1),
        "of_it_mapped_files_mib": round((after.shared - before.shared) / 2**20, 1),
    }


def measure(folder: Path, num_passages: int) -> dict[str, float]:
    """Write the data unless it is there, build its tables in a process of its own, and return what using them takes."""
    if not folder.exists():
        write_large_dataset(folder, num_passages)
    program = [sys.executable, "-m", "tests.trainer.data.memory", "--use", str(folder)]
    build = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    found = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return {
        **found,
        "build_s": build["open_s"],
        "tables_made_first": build["tables_made"],
        "growth_of_building_mib": build["growth_mib"],
    }


if __name__ == "__main__":
    if sys.argv[1] == "--use":
        print(json.dumps(use(Path(sys.argv[2]))))
    else:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
