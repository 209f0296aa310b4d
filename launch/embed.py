"""`negpool encode`: the embeddings of a file's texts, or of one side of a data set, as a file.

They go through shards as those of an evaluation do: what is encoded already is not encoded again, an interrupted command goes
on where it was, ranks share the work, and one shard is in memory at a time. The price is that they are on disk twice.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.models import KEEP_CACHED, join_for, start_as_rank
from launch.named import Reading, as_it_is, locate_model
from launch.output import told_progress
from mining.find.supplied import ids_file
from trainer.data.cache import cache_folder
from trainer.data.datasets import RetrievalData
from trainer.data.file_texts import FILES, read_texts_of
from trainer.encoder.missing import Texts
from trainer.encoder.model import load_encoder, weights_digest
from trainer.encoder.shards import Shards, open_shards, prune_shards
from trainer.encoder.tokens import tokenize_side, tokenize_texts
from trainer.encoder.towers import Side
from trainer.errors import InputError
from trainer.evaluate import encode_all
from trainer.handoff.manifest import is_disk_full
from trainer.handoff.pins import Pins
from trainer.handoff.rights import unreadable
from trainer.patience import Patience

IDS_BATCH = 10_000


def encode_to_file(model: str, reading: Reading, side: Side | None, out: Path) -> dict[str, Any] | None:
    """Write the embeddings of reading.data.path, and return what was written; None on ranks that do not speak. Collective.

    side: whose prefix, length and tower; None: by the name of the file (see `side_of`).
    """
    refuse_out(out)
    start_as_rank()
    side = side_of(reading.data.path) if side is None else side
    source = open_texts(reading, side)
    folder, shards_root = locate_model(model, cache_folder(reading.data.cache))
    world = join_for(reading)
    encoder, tokenizer, traits = load_encoder(as_it_is(reading.model, folder))
    encoder.to(world.device)
    if isinstance(source, RetrievalData):
        tokens = tokenize_side(source, "queries" if side == "query" else "corpus", tokenizer, traits)
        texts = source.queries if side == "query" else source.corpus
    else:
        tokens, texts = tokenize_texts(source, side, tokenizer, traits, reading.data.cache), source
    digest, patience = weights_digest(encoder), Patience(world)
    with Pins() if world.speaks else contextlib.nullcontext() as pins:
        shards = open_shards(shards_root, digest, traits.pooling, tokens, encoder, side, reading.encode, pins)
        with told_progress("encoding", world.speaks) as on_progress:
            encode_all(world, patience, [Texts(shards, encoder.side(side), tokens)], on_progress)
        if world.speaks:
            with patience.at_work():
                width = write_embeddings(out, shards, texts)
        patience.wait()
    world.leave()
    if not world.speaks:
        return None
    prune_shards(shards_root, KEEP_CACHED)
    ids = str(ids_file(out)) if out.suffix == ".npy" else None
    return {"out": str(out), "ids": ids, "side": side, "texts": len(texts), "width": width, "cut": tokens.num_truncated}


def side_of(path: Path) -> Side:
    """Return whose texts a file is taken to hold where nobody says: queries if it is called so, else passages."""
    return "query" if path.name.lower().startswith("quer") else "passage"


def open_texts(reading: Reading, side: Side) -> datasets.Dataset | RetrievalData:
    """Return the texts of the file that is named, or the data set if it is no file; raises InputError."""
    path = reading.data.path
    if (told := unreadable(path)) is not None:
        raise InputError(told)
    if path.is_file():
        return read_texts_of(path, side, reading.data.columns, reading.data.cache)
    if path.name.endswith(FILES) and not path.exists():
        raise InputError(f"there is no file {path}; give a file of texts, a data set's folder, or its name on the hub")
    return reading.open_data()


def refuse_out(out: Path) -> None:
    """Raise InputError if the embeddings cannot become files there."""
    if out.suffix not in WRITERS:
        raise InputError(f"--out {out} is no {' or '.join(WRITERS)}; end the file's name with one of them")
    for file in (out, *([ids_file(out)] if out.suffix == ".npy" else [])):
        if file.exists():
            raise InputError(f"{file} is there already; give --out a new file, or delete that one")


def write_embeddings(out: Path, shards: Shards, texts: datasets.Dataset) -> int:
    """Write all shards in their order, whole or not at all, and return the width; raises InputError if the disk refuses."""
    width = shards.read(0).shape[1]
    besides = {file: file.with_name(f".{file.name}.{os.getpid()}") for file in (ids_file(out), out)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[out.suffix](besides[out], besides[ids_file(out)], shards, texts, width)
        for file, beside in besides.items():  # the ids first: embeddings are never without
            if beside.exists():
                os.replace(beside, file)
    except (OSError, pa.ArrowException) as error:
        reason = "no room is left on the disk" if is_disk_full(error) else getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {out}: {reason}; give --out another file") from error
    finally:
        for beside in besides.values():
            with contextlib.suppress(OSError):
                beside.unlink()
    return width


def _write_npy(beside: Path, ids_beside: Path, shards: Shards, texts: datasets.Dataset, width: int) -> None:
    """Write (N, D) float32 as numpy reads and maps it, and the ids, one on each line."""
    with open(ids_beside, "w", encoding="utf-8", newline="\n") as file:
        for names in _ids(texts, IDS_BATCH):
            if odd := next((name for name in names if "\n" in name or "\r" in name), None):
                raise InputError(f"the id {odd!r} is longer than a line of {ids_file(beside).suffix}; give --out FILE.parquet")
            file.writelines(f"{name}\n" for name in names)
    with open(beside, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (shards.num_rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(shards.num_shards):
            file.write(shards.read(shard).astype("<f4", copy=False).tobytes())


def _write_parquet(beside: Path, _: Path, shards: Shards, texts: datasets.Dataset, width: int) -> None:
    """Write the columns id and embedding, a list of D float32, with a row group for each shard."""
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(beside, schema) as writer:
        for shard, names in enumerate(_ids(texts, shards.shard_rows)):
            flat = pa.array(shards.read(shard).astype(np.float32, copy=False).ravel())
            columns = [pa.array(names, pa.string()), pa.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(pa.table(columns, schema=schema))


def _ids(texts: datasets.Dataset, batch: int) -> Iterator[list[str]]:
    """Yield the ids of all texts, so many at a time."""
    for rows in texts.with_format("arrow").iter(batch):
        yield rows.column("_id").to_pylist()


WRITERS: dict[str, Callable[[Path, Path, Shards, datasets.Dataset, int], None]] = {".npy": _write_npy, ".parquet": _write_parquet}
