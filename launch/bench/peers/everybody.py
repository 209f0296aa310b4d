"""`negpool bench peers`: the same texts, model, batch and precision for us and for everybody else who computes this loss.

On each number of ranks everybody's settings are searched, gradients are compared with the exact one, steps are timed in turn,
forth and back, and everybody trains for some steps. Then mining and encoding, on one process. Finished parts are kept, so a
benchmark that was interrupted goes on behind them.
"""

import datetime
import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from launch.bench.kept_parts import KeptParts
from launch.bench.machine import describe
from launch.bench.made_texts import MIXES, data_of
from launch.bench.mining import MiningSizes, measure_encoding
from launch.bench.pairs import read_pairs
from launch.bench.peers.aloud import repeated
from launch.bench.peers.exact import write_exact
from launch.bench.peers.judged_part import write_judged_part
from launch.bench.peers.mined_alike import measure_mined
from launch.bench.peers.peer_sizes import PeerSizes
from launch.bench.peers.roster import left_out
from launch.bench.peers.training import SPLIT
from launch.bench.shapes import model_of
from launch.bench.step import precision_of
from launch.counted import counted
from launch.output import messages
from launch.ranks import on_ranks
from launch.versions import environment
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.errors import InputError
from trainer.world import World, stay_alone

RANKS_OF_A_CORE = 2  # at most; more ranks than cores wait for each other


def bench_peers(
    data: str, model: str, ranks: Sequence[int], sizes: PeerSizes, half: bool | None, is_quick: bool, out: Path
) -> dict[str, Any]:
    """Return everybody's figures. half: bfloat16 autocast for everybody; None: on a GPU. out: where parts are kept."""
    world = stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    check_ranks(ranks, world.device, sizes)
    path, precision = data_of(data), precision_of(half, world.device)
    options = {"data": data, "model": model, "precision": precision, "quick": is_quick, **asdict(sizes)}
    about = conditions(world.device, path, options)
    for name, reason in about["left_out"].items():
        messages().print(f"{name} is left out: {reason}", markup=False)
    if is_made := data in MIXES and not Path(data).is_dir():
        sizes = replace(sizes, steps=0)
    parts = KeptParts(out / "parts", about["identity"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, path, model, sizes)
        told = {"data": str(path), "precision": precision, "is_quick": is_quick, "sizes": asdict(sizes)}
        of_ranks = {str(num): measure_ranks(num, folder, told, parts) for num in ranks}
        has_peer = "sentence-transformers" not in about["left_out"]
        alone = measure_alone(folder / "model", path, sizes, precision, world, parts) if has_peer else {}
    return {**about, "options": options, "trains": sizes.steps > 0, "is_made": is_made, "ranks": of_ranks, **alone}


def conditions(device: torch.device, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return when and with what is measured, and in `identity` all of it that one table has in common."""
    about = environment()
    hardware = {**describe(device), "has_gpu": device.type == "cuda", "cores": len(os.sched_getaffinity(0))}
    out_of_it = left_out(hardware["has_gpu"])
    identity = {"commit": about["commit"], **hardware, **options, "left_out": sorted(out_of_it)}
    identity["data_digest"] = open_dataset(path, None).digest
    told = {"date": datetime.date.today().isoformat(), "commit": about["commit"], "libraries": about["libraries"]}
    return {**told, **hardware, "left_out": out_of_it, "identity": identity}


def measure_ranks(num_ranks: int, folder: Path, told: dict[str, Any], parts: KeptParts) -> dict[str, Any]:
    """Return everybody's rows on so many ranks, and repeat what these say meanwhile."""
    messages().print(f"[dim]everybody's steps on {counted(num_ranks, 'rank')}[/dim]")
    measure = functools.partial(on_ranks, "launch.bench.peers.on_one_world", num_ranks, folder=str(folder), **told)
    with repeated(folder / f"said-on-{num_ranks}.txt"):
        return parts.part(f"ranks-{num_ranks}", measure)


def measure_alone(model: Path, path: Path, sizes: PeerSizes, precision: str, world: World, parts: KeptParts) -> dict[str, Any]:
    """Return what mining and encoding take us and sentence-transformers, on one process."""
    messages().print("[dim]mining, then encoding, on one process[/dim]")
    of_encoding = MiningSizes(texts=sizes.texts, max_tokens=sizes.max_tokens, rounds=sizes.rounds)
    mined = parts.part(
        "mining",
        lambda: measure_mined(path, str(model), sizes.mined, sizes.max_tokens, precision, sizes.rounds, world),
    )
    encoded = parts.part("encoding", lambda: measure_encoding(path, str(model), of_encoding, world, precision, peer=True))
    return {"mining": mined, "encoding": encoded}


def check_ranks(ranks: Sequence[int], device: torch.device, sizes: PeerSizes) -> None:
    """Raise InputError for ranks that the machine does not have, or that a batch cannot be divided over."""
    cores = len(os.sched_getaffinity(0))
    most, what = (torch.cuda.device_count(), "GPU") if device.type == "cuda" else (RANKS_OF_A_CORE * cores, "core")
    if too_many := [num for num in ranks if num > most]:
        has = counted(most if what == "GPU" else cores, what)
        raise InputError(f"--ranks {too_many[0]} is more than this machine takes: it has {has}; up to {most} ranks fit")
    for num in ranks:
        for name in ("queries", "compared", "trained_queries"):
            if getattr(sizes, name) % num:
                raise InputError(
                    f"{getattr(sizes, name)} pairs cannot be divided over {num} ranks; set --queries to a multiple of {4 * num}"
                )


def prepare(folder: Path, path: Path, model: str, sizes: PeerSizes) -> None:
    """Write what all ranks read: the model as everybody can open it, the exact gradient, and a part of the test split."""
    settings = ModelSettings(name=model_of(model), max_query_tokens=sizes.max_tokens, max_passage_tokens=sizes.max_tokens)
    encoder, tokenizer, traits = load_encoder(settings)
    if not traits.normalize:  # as the losses of most packages do by themselves
        raise InputError(f"{model} does not normalise its embeddings, and the peers do; set --model to one that does")
    (folder / "model").mkdir()
    save_encoder(folder / "model", encoder, tokenizer, traits)
    messages().print(f"[dim]the exact gradient of {sizes.compared} pairs, in float64[/dim]")
    pairs = read_pairs(path, tokenizer, sizes.compared, sizes.max_tokens, only="train")
    write_exact(folder / "exact.safetensors", str(folder / "model"), sizes.max_tokens, pairs)
    if sizes.steps:
        write_judged_part(path, folder / "test-part", SPLIT, sizes.test_queries, sizes.test_passages)
