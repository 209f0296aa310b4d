"""Embeddings of a corpus in shards of fixed size, kept on disk under a fingerprint of all they depend on.

Shards do not depend on who encodes them or on how many do: the trainer's evaluation, the miner and `negpool search`
read and add to the same folder. A shard is a version (see handoff/manifest.py): whole or absent. Who encodes it is decided
by leases, files that the first of several processes can make.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from trainer.encoder.encode import DTYPES, ENCODE_TOKENS, encode_rows
from trainer.encoder.tokens import TokenTable
from trainer.errors import NotFiniteEmbedding
from trainer.handoff.manifest import MANIFEST, TornVersion, disk_error, open_version, publish_version
from trainer.ranges import job_section

LEASE = ".lease-"


@job_section
class EncodeSettings:
    """Section `encode`: how the miner encodes; the trainer's evaluation goes by the defaults, and shares what has them."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the encoder multiplies in; bf16: several times faster on GPUs."""
    stored: Literal["fp32", "fp16"] = "fp32"
    """What embeddings are on disk; fp16: half the disk and half the reading."""

    @property
    def stored_type(self) -> type[np.floating]:
        """What numpy calls the embeddings on disk."""
        return np.float32 if self.stored == "fp32" else np.float16


DEFAULTS = EncodeSettings()


@dataclass(frozen=True)
class Shards:
    """The embeddings of `num_rows` texts under one fingerprint; parts of them may not be encoded yet."""

    folder: Path
    num_rows: int
    shard_rows: int
    settings: EncodeSettings = DEFAULTS

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> np.ndarray:
        """Return the row numbers of a shard, (rows,) int64."""
        return np.arange(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def missing(self) -> list[int]:
        """Return the shards that are not there yet."""
        return [i for i in range(self.num_shards) if not (self._path(i) / MANIFEST).is_file()]

    def lease(self, shard: int) -> bool:
        """Take a shard for this process; False: another one has it. Leases hold until `end_leases`."""
        try:
            (self.folder / f"{LEASE}{shard:06d}").open("x").close()
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def end_leases(self) -> None:
        """Forget all leases, also those of processes that died; when nobody is encoding."""
        for lease in self.folder.glob(f"{LEASE}*"):
            lease.unlink(missing_ok=True)

    def encode(
        self, shard: int, encoder: nn.Module, tokens: TokenTable, on_progress: Callable[[int], None] = lambda n: None
    ) -> None:
        """Encode one shard and publish it whole; raises NotFiniteEmbedding."""
        self.publish(shard, self.embed(shard, encoder, tokens, on_progress))

    def embed(
        self, shard: int, encoder: nn.Module, tokens: TokenTable, on_progress: Callable[[int], None] = lambda n: None
    ) -> np.ndarray:
        """Return the embeddings of one shard as they are stored; raises NotFiniteEmbedding."""
        rows, settings = self.rows(shard), self.settings
        embedding_nD = encode_rows(encoder, tokens, rows, on_progress, DTYPES[settings.dtype])
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            embedding_nD = embedding_nD.astype(settings.stored_type, copy=False)
        check_finite(embedding_nD, tokens, rows)
        return embedding_nD

    def publish(self, shard: int, embedding_nD: np.ndarray) -> None:
        """Write one shard whole."""

        def write(folder: Path) -> None:
            np.save(folder / "embeddings.npy", embedding_nD, allow_pickle=False)

        publish_version(self._path(shard), write, {"shard": shard, "rows": len(embedding_nD)})

    def read(self, shard: int) -> np.ndarray:
        """Return the verified embeddings of a shard, (rows, D), memory-mapped; raises TornVersion."""
        open_version(self._path(shard))
        return np.load(self._path(shard) / "embeddings.npy", mmap_mode="r", allow_pickle=False)

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of any rows, (len(rows), D) float32, in their order."""
        shard_of_row = rows // self.shard_rows
        parts = {s: self.read(int(s)) for s in np.unique(shard_of_row)}
        found = [parts[s][row - s * self.shard_rows] for s, row in zip(shard_of_row, rows, strict=True)]
        return np.stack(found).astype(np.float32, copy=False)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}"


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
    part: str | None = None,
    settings: EncodeSettings = DEFAULTS,
) -> Shards:
    """Return the shards of a token table under given weights; makes their folder.

    part: which of two towers encodes them.
    """
    shard_rows = rows_of_shard(len(tokens.lengths))
    depends_on = {
        "weights": weights_digest,
        "pooling": pooling,
        "tokens": tokens.digest,  # texts, tokenizer, prefix, maximum length
        **asdict(settings),
        "budget": ENCODE_TOKENS,
        "shard_rows": shard_rows,
        **({} if part is None else {"part": part}),
    }
    fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()  # prune_shards keeps the youngest
    return Shards(folder, len(tokens.lengths), shard_rows, settings)


def rows_of_shard(num_rows: int) -> int:
    """Return the size of a shard, what a crash costs: some 32 to 64 shards, within 128 to 65,536 rows each.

    It depends on the number of texts alone, never on the number of ranks.
    """
    return min(65536, max(128, 1 << (max(1, num_rows // 32).bit_length() - 1)))


def drop_torn(shards: Shards) -> list[int]:
    """Delete the shards that do not verify, so that they are encoded again; return their numbers."""
    torn = []
    for shard in sorted(set(range(shards.num_shards)) - set(shards.missing())):
        try:
            shards.read(shard)
        except TornVersion:
            shutil.rmtree(shards._path(shard), ignore_errors=True)
            torn.append(shard)
    return torn


def prune_shards(root: Path, keep: int) -> None:
    """Delete all fingerprints but the `keep` youngest."""
    by_age = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in by_age[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
