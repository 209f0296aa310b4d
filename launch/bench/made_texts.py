"""Made texts of stated lengths, for measurements where no data set is at hand: the same ones on every machine.

A text is random words of the vocabulary of `shapes.py`, one token each for the models there; a tokenizer of another model cuts a
word into several. Every query has one passage, and no two texts are equal.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.bench.shapes import NUM_WORDS, word
from trainer.data.cache import build_once, cache_folder

NUM_PAIRS, NUM_TEST = 8192, 128  # of the training split and of the test split
FORMAT = 2  # of the folder; another number makes it again


@dataclass(frozen=True)
class Lengths:
    """Tokens of texts: log-normal around a median, with the special ones, and cut off at both ends."""

    median: float
    spread: float  # standard deviation of the logarithm; 0: all are alike
    least: int
    most: int

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Return (count,) int64 lengths."""
        drawn = self.median * np.exp(self.spread * np.random.default_rng(seed).standard_normal(count))
        return drawn.round().astype(np.int64).clip(self.least, self.most)


# Of queries and of passages. The last is like questions of a search engine and passages of MS MARCO: 10 and 72 tokens.
MIXES = {
    "made-256": (Lengths(256, 0, 256, 256), Lengths(256, 0, 256, 256)),
    "made-64": (Lengths(64, 0, 64, 64), Lengths(64, 0, 64, 64)),
    "made-mixed": (Lengths(10, 0.4, 5, 64), Lengths(72, 0.45, 12, 256)),
}


def data_of(name: str, cache: Path | None = None, num_pairs: int = NUM_PAIRS) -> Path:
    """Return the folder of a data set of one of MIXES, in BEIR's form, made now or before; any other name as a path."""
    if name not in MIXES or Path(name).is_dir():
        return Path(name)
    folder = cache_folder(cache) / f"bench-{name}-{num_pairs}-{FORMAT}"
    count = num_pairs + NUM_TEST
    splits = {"train": range(num_pairs), "test": range(num_pairs, count)}

    def write(staging: Path) -> None:
        _write_data(staging / "data", MIXES[name], count, count, splits)

    built = build_once(folder, f"made texts {name}", write)
    return built / "data"  # beside it is the manifest, which is no part of a data set


def write_made(folder: Path, name: str, num_queries: int, num_passages: int) -> None:
    """Write a data set of one of MIXES with a training split alone: the passages of its queries are the first ones."""
    _write_data(folder, MIXES[name], num_queries, num_passages, {"train": range(num_queries)})


def _write_data(
    folder: Path, mix: tuple[Lengths, Lengths], num_queries: int, num_passages: int, splits: dict[str, range]
) -> None:
    folder.mkdir()
    for side, lengths, count in zip(("queries", "corpus"), mix, (num_queries, num_passages), strict=True):
        texts = _texts(lengths.draw(count, seed=len(side)), seed=len(side))
        with open(folder / f"{side}.jsonl", "w") as file:
            file.writelines(f'{{"_id": "{side[0]}{row}", "text": "{text}"}}\n' for row, text in enumerate(texts))
    (folder / "qrels").mkdir()
    for split, rows in splits.items():
        lines = "".join(f"q{row}\tc{row}\t1\n" for row in rows)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)


def _texts(lengths: np.ndarray, seed: int) -> list[str]:
    """Return random texts of so many tokens; the first two words are the text's number, so that none is equal to another."""
    draw = np.random.default_rng(seed)
    texts = []
    for row, length in enumerate(lengths.tolist()):
        words = [row // NUM_WORDS, row % NUM_WORDS, *draw.integers(0, NUM_WORDS, length - 4).tolist()]
        texts.append(" ".join(map(word, words)))
    return texts
