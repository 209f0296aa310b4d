"""Embeddings of a corpus in shards of fixed size, kept on disk under a fingerprint of all they depend on.

Shards do not depend on who encodes them or on how many do: the trainer's evaluation, the miner, the filter of data and
`negpool search` read and add to the same folder, also at once (see missing.py). A shard is a version (see
handoff/manifest.py): whole or absent. Whoever encodes or reads a fingerprint pins it, and prune_shards leaves it alone.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.encoder.auto import encode_on
from trainer.encoder.encode import DTYPES, Batches, token_budget
from trainer.encoder.fit import halved_to
from trainer.encoder.packed import packs
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder, Side
from trainer.errors import NotFiniteEmbedding
from trainer.handoff.arrays import map_array
from trainer.handoff.lease import LEASE, Lease, take_lease
from trainer.handoff.manifest import (
    DELETED,
    MANIFEST,
    STAGING,
    TornVersion,
    is_pinned,
    open_version,
    publish_version,
    remove_torn,
)
from trainer.handoff.pins import Pins
from trainer.handoff.retention import delete_unpinned

NAME = "shard-"


DEFAULTS = EncodeSettings()
FLOAT32 = EncodeSettings(dtype="fp32", stored="fp32")


@dataclass(frozen=True)
class Shards:
    """The embeddings of `num_rows` texts under one fingerprint; parts of them may not be encoded yet."""

    folder: Path
    num_rows: int
    shard_rows: int
    settings: EncodeSettings = FLOAT32  # with nothing in them that is "auto"

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> np.ndarray:
        """Return the row numbers of a shard, (rows,) int64."""
        return np.arange(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def missing(self) -> list[int]:
        """Return the shards that are not there yet."""
        return sorted(self.missing_and_leased()[0])

    def missing_and_leased(self) -> tuple[set[int], set[int]]:
        """Return the shards that are not there yet, and those that somebody holds or held; lists the folder once."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            names = []
        there, leased = (
            {int(name[len(start) :].split(".")[0]) for name in names if name.startswith(start)} for start in (NAME, LEASE + NAME)
        )
        return set(range(self.num_shards)) - there, leased

    def is_there(self, shard: int) -> bool:
        """Tell whether a shard has been published; asks for one file."""
        return (self._path(shard) / MANIFEST).is_file()

    def lease(self, shard: int) -> Lease | None:
        """Take a shard for this process; None: another one has it. Raises WorkFailed if it has no finite embeddings."""
        return take_lease(self.folder, _name(shard))

    def drop_torn(self, shard: int) -> bool:
        """Delete a shard that does not verify, so that it is encoded again; return whether it was deleted."""
        return remove_torn(self._path(shard))

    def batches(self, shard: int, encoder: Encoder, tokens: TokenTable, reader: Executor) -> Batches:
        """Return the batches of one shard's texts, the first of them read in the thread that calls."""
        return Batches(encoder, tokens, self.rows(shard), DTYPES[self.settings.dtype], reader)

    def embed(
        self,
        shard: int,
        batches: Batches,
        on_progress: Callable[[int], None] = lambda n: None,
        then: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the embeddings of one shard as they are stored, on the encoder's device; they may not be finite.

        on_progress, then: as `Batches.embed` has them.
        """
        return batches.embed(DTYPES[self.settings.stored], on_progress, then)

    def publish(self, shard: int, embedding_nD: np.ndarray, by: str = "") -> bool:
        """Write one shard whole; return whether it is there by this call, and not by another one before.

        Its manifest names the tokens of a batch where memory has made them fewer than planned.
        by: a name that no other call has; a call that is repeated after a disk's failure keeps its own.
        """

        def write(folder: Path) -> None:
            np.save(folder / "embeddings.npy", embedding_nD, allow_pickle=False)

        made_with = {} if halved_to() is None else {"batch_tokens": halved_to()}
        fields = {"shard": shard, "rows": len(embedding_nD), "by": by, **made_with}
        return publish_version(self._path(shard), write, fields, digest="xxh3_128").get("by") == by

    def read(self, shard: int) -> np.ndarray:
        """Return the verified embeddings of a shard, (rows, D), memory-mapped; raises TornVersion."""
        open_version(self._path(shard))
        return self.map(shard)

    def map(self, shard: int) -> np.ndarray:
        """Return the embeddings of a shard as `read` does, for who knows that they have been verified; raises TornVersion."""
        file = self._path(shard) / "embeddings.npy"
        try:
            return map_array(file)
        except (OSError, ValueError) as error:
            raise TornVersion(f"{file} is missing or no whole array") from error

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of any rows, (len(rows), D) float32, in their order."""
        shard_of_row = rows // self.shard_rows
        parts = {s: self.read(int(s)) for s in np.unique(shard_of_row)}
        found = [parts[s][row - s * self.shard_rows] for s, row in zip(shard_of_row, rows, strict=True)]
        return np.stack(found).astype(np.float32, copy=False)

    def _path(self, shard: int) -> Path:
        return self.folder / _name(shard)


def _name(shard: int) -> str:
    return f"{NAME}{shard:06d}"


def check_finite(embedding_nD: np.ndarray, tokens: TokenTable, rows: np.ndarray) -> None:
    """Raise NotFiniteEmbedding, naming the first text, if any of some rows' embeddings holds NaN or infinity."""
    is_finite = np.isfinite(embedding_nD).all(1)
    if not is_finite.all():
        row = int(rows[np.argmin(is_finite)])
        raise NotFiniteEmbedding(
            f"the embedding of {tokens.name(row)} is not finite, and so for {int((~is_finite).sum())} of {len(rows)} texts; "
            "the weights have diverged (set optim.lr lower), or need another encode.dtype or encode.stored"
        )


def open_shards(
    root: Path,
    weights_digest: str,
    pooling: str,
    tokens: TokenTable,
    encoder: Encoder,
    side: Side,
    settings: EncodeSettings = DEFAULTS,
    pins: Pins | None = None,
) -> Shards:
    """Return the shards of a token table under given weights; makes their folder.

    encoder: one that encodes as those of the weights do: on the same device, by the same products.
    settings: what is "auto" in them is what suits the encoder's device.
    pins: protects the folder from deletion. None: another rank protects it, or nothing is ever deleted below this root.
    """
    shard_rows = rows_of_shard(len(tokens.lengths))
    part = encoder.part(side)  # of two towers
    settings = encode_on(settings, next(encoder.parameters()).device)
    depends_on = {
        "weights": weights_digest,
        "pooling": pooling,
        "tokens": tokens.digest,  # texts, tokenizer, prefix, maximum length
        **settings.numbers,
        **numerics(encoder),
        "shard_rows": shard_rows,
        **({} if part is None else {"part": part}),
        **({"packed": True} if packs(encoder, next(encoder.parameters()).device, DTYPES[settings.dtype]) else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / fingerprint
    if pins is not None:
        pins.hold(folder)
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # pruned in between; who encodes makes it anew
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # prune_shards keeps the youngest
    return Shards(folder, len(tokens.lengths), shard_rows, settings)


def numerics(encoder: Encoder) -> dict[str, Any]:
    """Return what decides how an encoder computes, beside its weights: what a job or the kind of machine chooses.

    TensorFloat-32 and 4-bit layers move an embedding by a thousandth; another device moves its last bits, and two halves of a
    table that were made differently would not rank equal texts alike. Compiled layers are none of it: they train, and plain
    ones make every embedding that is kept (see compiled.py). Versions of libraries are left out:
    an upgrade may change the last bits, the embedding is as good as before, and encoding the corpus again would gain nothing.
    """
    device = next(encoder.parameters()).device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "tf32": on_gpu and torch.backends.cuda.matmul.allow_tf32,
        "quantized": encoder.is_quantized,
        "budget": token_budget(device),
    }


def rows_of_shard(num_rows: int) -> int:
    """Return the size of a shard, what a crash costs: 128 to 255 shards, within 128 to 8,192 rows each.

    It depends on the number of texts alone, never on the number of ranks. MS MARCO's 8.8 million passages are 1,080 shards,
    seventeen for each of 64 ranks, and 100 million are 12,208, of two small and one larger file each: as many as a folder lists
    in a moment. 8,192 short texts are some batches of a GPU, and a tile of the search.
    """
    return min(8192, max(128, 1 << (max(1, num_rows // 128).bit_length() - 1)))


def prune_shards(root: Path, keep: int) -> list[Path]:
    """Delete all fingerprints but the `keep` youngest and the pinned ones; return what was deleted.

    Any process may do so at any time.
    """
    for leftover in root.glob(f"{STAGING}*{DELETED}"):  # of a process that was killed while it deleted
        if not is_pinned(root / leftover.name.removeprefix(STAGING).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    by_age = sorted(_ages(root), reverse=True)
    return [folder for _, folder in by_age[keep:] if delete_unpinned(folder)]


def _ages(root: Path) -> Iterator[tuple[float, Path]]:
    """Yield (time of the last use, folder) of every fingerprint."""
    for folder in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process deletes, too
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder.stat().st_mtime, folder
