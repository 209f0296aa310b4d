"""Hard negatives of one table by us and by sentence-transformers: `mine_negatives` against `mine_hard_negatives`.

Both begin with texts and end with the nearest passages of each query that nobody judged relevant, as rows in memory; no filter
and no cache. Theirs is at the best of its settings, its model loaded in advance; ours loads the model as part of its time.
"""

import contextlib
import functools
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from launch.bench.peer import open_peer
from launch.bench.peers.judged_part import write_judged_part
from launch.bench.turns import compared, take_turns, try_settings
from launch.python.hard_negatives import mine_negatives
from trainer.encoder.encode import DTYPES
from trainer.encoder.source import resolve_model
from trainer.world import World

NEGATIVES = 8  # of each query
TRIED_PASSAGES = 200  # of the corpus, to find the best setting
BATCHES = {"cpu": (16, 32, 64), "cuda": (128, 512)}
OURS, THEIRS = "ours, mine_negatives", "sentence-transformers, mine_hard_negatives"

Chosen = dict[str, set[str]]  # negatives of each query, by text
Mined = Callable[[], Chosen]


def measure_mined(
    data: Path, model: str, passages: int, max_tokens: int, precision: str, rounds: int, world: World
) -> dict[str, Any]:
    """Return what both take, and the share of their negatives that are the same.

    passages: about so many, half of them the positives of as many queries.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_judged_part(data, folder / "data", "train", passages // 2, passages // 2)
        theirs = Theirs(folder / "data", model, max_tokens, precision, world.device)
        trials = theirs.trials(world)
        setting = theirs.settings[min((taken, name) for name, taken in trials.items() if taken is not None)[1]]
        chosen: dict[str, Chosen] = {}

        def keep(side: str, mine: Mined) -> None:
            chosen[side] = mine()

        ways = {
            OURS: functools.partial(keep, OURS, our_way(folder, model, max_tokens, precision)),
            THEIRS: functools.partial(keep, THEIRS, functools.partial(theirs.mine, setting)),
        }
        turns = take_turns(ways, rounds, world)
        return {
            "passages": len(theirs.corpus),
            "queries": len(chosen[OURS]),
            "negatives": NEGATIVES,
            "sides": compared(turns, OURS, {}),
            "trials": trials,
            "same_negatives": round(shared(chosen[OURS], chosen[THEIRS]), 4),
        }


def our_way(folder: Path, model: str, max_tokens: int, precision: str) -> Mined:
    """Return our way; every call has a cache of its own, so nothing is encoded already."""
    numbers = itertools.count()

    def mine() -> Chosen:
        settings: dict[str, Any] = {
            "num_negatives": NEGATIVES,
            "method": "top",
            "relative_margin": "off",
            "max_query_tokens": max_tokens,
            "max_passage_tokens": max_tokens,
            "precision": precision,
            "data.cache": str(folder / f"cache-{next(numbers)}"),
        }
        with contextlib.redirect_stderr(io.StringIO()):  # its progress
            rows = mine_negatives(model, str(folder / "data"), form="tevatron", **settings).to_dataset()
        return {row["query"]: {text["text"] for text in row["negative_passages"]} for row in rows}

    return mine


class Theirs:
    """sentence-transformers on the same table."""

    def __init__(self, data: Path, model: str, max_tokens: int, precision: str, device: torch.device):
        self.device, self.dtype = device, DTYPES[precision]
        self.model = open_peer(resolve_model(model), device, self.dtype)
        self.model.max_seq_length = max_tokens
        texts = {
            name: dict(map(_named_text, (data / f"{name}.jsonl").read_text().splitlines())) for name in ("queries", "corpus")
        }
        self.corpus = list(texts["corpus"].values())
        pairs = [line.split("\t")[:2] for line in (data / "qrels" / "train.tsv").read_text().splitlines()[1:]]
        sides = {"query": [texts["queries"][query] for query, _ in pairs], "positive": [texts["corpus"][row] for _, row in pairs]}
        self.pairs = datasets.Dataset.from_dict(sides)
        every = [{"batch_size": rows, "use_faiss": False} for rows in BATCHES[device.type]]
        if _has_faiss():
            every += [{"batch_size": rows, "use_faiss": True} for rows in BATCHES[device.type][:1]]
        self.settings = {", ".join(f"{key}={value}" for key, value in setting.items()): setting for setting in every}

    def mine(self, setting: Mapping[str, Any], passages: int | None = None) -> Chosen:
        """Return the negatives of the queries; passages: of the corpus, the first ones, and their queries."""
        from sentence_transformers.util import mine_hard_negatives

        corpus = self.corpus[:passages]
        pairs = self.pairs if passages is None else self.pairs.select(range(min(len(self.pairs), passages)))
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, contextlib.redirect_stderr(io.StringIO()):  # its bars
            rows = mine_hard_negatives(
                pairs, self.model, corpus=corpus, num_negatives=NEGATIVES, output_format="n-tuple", verbose=False, **setting
            )
        return {row["query"]: {row[f"negative_{number + 1}"] for number in range(NEGATIVES)} for row in rows}

    def trials(self, world: World) -> dict[str, float | None]:
        """Return the seconds of each setting on a part of the table; None: it does not fit into memory."""
        ways = {name: functools.partial(self.mine, setting, TRIED_PASSAGES) for name, setting in self.settings.items()}
        return try_settings(ways, world)


def shared(ours: Chosen, theirs: Chosen) -> float:
    """Return the share of negatives that are the same, over the queries that both have."""
    both = ours.keys() & theirs.keys()
    return sum(len(ours[query] & theirs[query]) for query in both) / max(1, sum(len(ours[query]) for query in both))


def _named_text(line: str) -> tuple[str, str]:
    row = json.loads(line)
    return row["_id"], row["text"]


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True
