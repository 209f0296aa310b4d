"""This machine as a device of a plan: a short step of the job's own model, on as many ranks as are planned, all at once.

Measured are a large product, the encoder with and without graph on texts of the job's mean length, the loss on made embeddings,
AdamW's update, and each collective in two sizes, which gives its latency and its bandwidth.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import psutil
import pydantic
import torch
import torch.distributed as dist
from torch import Tensor

from gradcache import Batch, InfoNCE, LossOptions, NoSync, Temperature, Tower, cached_step
from launch.bench.flops import token_flops
from launch.bench.machine import describe, matmul_rate
from launch.fabric import COLLECTIVES, Fabric, Wire, sent_bytes
from launch.plan.devices import GIB, HERE, PlannedDevice
from launch.plan.step_work import UPDATE_BYTES
from launch.ranks import answer, on_ranks
from trainer.backends import parallelize
from trainer.encoder.encode import DTYPES
from trainer.encoder.model import Encoder, load_encoder
from trainer.encoder.settings import ModelSettings
from trainer.job import OptimSettings, ParallelSettings
from trainer.world import World, join_world

ROUNDS = 5
LOSS_ROWS = 1024
SIZES = (2**10, 2**23)  # bytes of a collective
MOST_TOKENS = 1024  # of a measured batch


def measure_here(
    model: ModelSettings, encode: str, mean_tokens: float, chunk_tokens: int, num_ranks: int
) -> tuple[PlannedDevice, Fabric | None]:
    """Return this machine's cores as a device, and what joins its ranks; num_ranks work at once, None joins one.

    model: of the job, with its weights; encode: what it multiplies in. chunk_tokens: encoded at once, up to MOST_TOKENS.
    """
    length, tokens = max(2, round(mean_tokens)), min(MOST_TOKENS, chunk_tokens)
    module = "launch.plan.measured_device"
    found = on_ranks(module, num_ranks, model=asdict(model), encode=encode, length=length, tokens=tokens)
    device = PlannedDevice(**found["device"])
    if num_ranks == 1:
        return device, None
    fabric = Fabric(
        name="this machine",
        ranks_per_node=len(os.sched_getaffinity(0)),
        hardware=device.hardware,
        date=time.strftime("%Y-%m-%d"),
        source="measured by negpool plan --device cpu in two sizes",
        inside={name: Wire(**wire) for name, wire in found["wires"].items()},
    )
    return device, fabric


def measure_ranks(model: dict[str, Any], encode: str, length: int, tokens: int) -> dict[str, Any] | None:
    """Return the numbers of a device and of its wires on rank 0, None elsewhere: means over all ranks. Collective."""
    import trainer.train  # noqa: F401  # so that all is there that a trainer's process imports

    world = join_world(encode)
    try:
        encoder, *_ = load_encoder(pydantic.TypeAdapter(ModelSettings).validate_python(model))
        weights = sum(p.nbytes for p in encoder.parameters() if p.detach().sum().isfinite())  # files are mapped: all is read now
        process_bytes = psutil.Process().memory_info().rss - weights
        numbers = _mean(world, _rates(world, encoder, encode, length, tokens))
        wires = {name: asdict(_wire(world, name)) for name in COLLECTIVES} if world.group is not None else {}
        about = describe(world.device)
        device = {
            "name": HERE,
            "type": "cpu",
            "hardware": f"{about['device']}, {about['threads']} thread(s) a rank",
            "source": f"measured by negpool plan on {world.num_ranks} rank(s) at once, {time.strftime('%Y-%m-%d')}",
            "memory_gib": psutil.virtual_memory().total / world.num_ranks / GIB,
            "process_gib": process_bytes / GIB,
            "compiled_gain": 1.0,
            "launch_s": 1e-9,  # it is part of what is measured
            **numbers,
        }
        return {"device": device, "wires": wires} if world.speaks else None
    finally:
        world.leave()


def _rates(world: World, encoder: Encoder, encode: str, length: int, tokens: int) -> dict[str, float]:
    """Return this rank's rates and shares. Collective."""
    dtype = DTYPES[encode]
    fp32, rate = (matmul_rate(world.device, kind) for kind in (torch.float32, dtype))
    forward_rate, both_rate, updated_rate = _encoder_rates(world, encoder, dtype, length, tokens)
    shares = {
        "forward_share": forward_rate / rate,
        "both_share": both_rate / rate,
        "loss_share": _loss_rate(world, encoder.width) / fp32,
    }
    rates = {"matmul_fp32_flops_per_s": fp32, "matmul_flops_per_s": rate, "peak_flops_per_s": max(fp32, rate)}
    return rates | {"memory_bytes_per_s": updated_rate} | {name: min(1.0, share) for name, share in shares.items()}


def _encoder_rates(world: World, encoder: Encoder, dtype: torch.dtype, length: int, tokens: int) -> tuple[float, float, float]:
    """Return operations per second without graph, forward and backward, and bytes per second of an update. Collective."""
    tower = encoder.side("passage")
    rows = max(1, tokens // length)
    ids = torch.randint(0, int(tower.model.config.vocab_size), (rows, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    flops = token_flops(tower)
    forward = flops.forward(rows * length, rows * length**2)
    both = forward + flops.backward(rows * length, rows * length**2)
    parallel = parallelize(encoder, world, ParallelSettings(), OptimSettings())
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def encode(grad: AbstractContextManager[Any]) -> Tensor:
        with grad, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return tower(inputs)

    def forward_and_backward() -> None:
        encode(torch.enable_grad()).sum().backward()

    forward_s = _seconds(world, lambda: encode(torch.no_grad()))
    both_s = _seconds(world, forward_and_backward)
    update_s = _seconds(world, lambda: parallel.update(scaler), before=forward_and_backward)
    num_trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    return forward / forward_s, both / both_s, UPDATE_BYTES * num_trained / update_s


def _loss_rate(world: World, width: int) -> float:
    """Return the operations per second of a loss and its gradient, of three products, on embeddings that are there."""
    rows = 2 * LOSS_ROWS
    embedding_nD = torch.nn.functional.normalize(torch.randn(rows, width), dim=1)
    tower = Tower(encode=lambda chosen: embedding_nD[chosen], lengths=torch.ones(rows, dtype=torch.int64), load=lambda r: r)
    keys, target = torch.arange(rows), torch.arange(LOSS_ROWS)
    positives = keys[LOSS_ROWS:][target][:, None]
    batch = Batch(towers=[tower], num_queries=LOSS_ROWS, keys=keys, target=target, positive_keys=positives)
    options, temperature, seconds = LossOptions(objective=InfoNCE()), Temperature(0.05), []
    for step in range(ROUNDS + 1):
        world.barrier()
        result = cached_step(
            batch, loss=options, temperature=temperature, sync=NoSync(), group=None, chunk_tokens=rows, keep_graphs=0, seed=0,
            step=step,
        )  # fmt: skip
        seconds.append(result.loss_s)
    return 3 * 2.0 * LOSS_ROWS**2 * width / statistics.median(seconds[1:])


def _wire(world: World, collective: str) -> Wire:
    """Return latency and bandwidth of a collective on this machine's ranks, from its two sizes. Collective."""
    ranks = world.num_ranks
    times = [_seconds(world, _call(world, collective, size)) for size in SIZES]
    small_s, large_s = _mean(world, {"small": times[0], "large": times[1]}).values()
    hops = (2 if collective == "all_reduce" else 1) * (ranks - 1)
    sent = [sent_bytes(collective, size, ranks) for size in SIZES]
    rate = (sent[1] - sent[0]) / max(1e-9, large_s - small_s)
    return Wire(latency_s=max(1e-9, small_s - sent[0] / rate) / hops, bytes_per_s=rate)


def _call(world: World, collective: str, size: int) -> Callable[[], Any]:
    """Return what calls a collective on a buffer of so many bytes."""
    count, group = size // 4 // world.num_ranks, world.group
    whole, part = torch.zeros(count * world.num_ranks), torch.zeros(count)
    other = torch.empty_like(whole)
    return {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }[collective]


def _seconds(world: World, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the median time of some calls that all ranks begin together; a first one is not counted. Collective."""
    found = []
    for _ in range(ROUNDS + 1):
        before()
        world.barrier()
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _mean(world: World, numbers: dict[str, float]) -> dict[str, float]:
    if world.group is None:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, group=world.group)
    return dict(zip(numbers, (values / world.num_ranks).tolist(), strict=True))


if __name__ == "__main__":
    answer(measure_ranks)
