"""Lines of `negpool bench gpu` about the encoder: the machine's ceilings, a model's forward and backward, whole cached steps.

Shares are of the rate of a large product in the encoder's precision, measured beside them. Operations are those of
`forward_flops`: 6 a matrix weight and token for a forward and its backward, and attention's; padding and what is computed twice
because a graph was not kept do not count, but in a cached step, whose second forward is work that it is meant to do.
"""

import functools

import numpy as np
import torch

from gradcache import Batch
from gradcache.plan import encode_chunk, plan_encoding
from launch.bench.busy import busy_share, count_waits
from launch.bench.flops import forward_flops
from launch.bench.job_path import encoded_by, load
from launch.bench.lines import Row
from launch.bench.machine import matmul_rate, seconds_of
from launch.bench.made_texts import MIXES, data_of
from launch.bench.pairs import Pairs, read_pairs
from launch.bench.peer import TRIAL_PAIRS, Peer, best_setting, named
from launch.bench.sizes import Sizes
from launch.bench.step import NONE_KEPT, PEER, StepBench
from launch.bench.turns import take_turns
from trainer.encoder.encode import DTYPES, encode_rows
from trainer.encoder.model import Encoder
from trainer.errors import InputError
from trainer.world import World, stay_alone

BOTH, FORWARD = "forward + backward", "forward only"
WANTED = {BOTH: 0.55, FORWARD: 0.60, "step": 0.50, "times": 3.0}
WANTED_TOKENS_PER_S = 2.2e6  # of a forward of BERT-base
STEP_DATA = "made-mixed"
PROFILED_STEPS = 3


def here() -> World:
    """Return the world of a bench: this process, on the GPU where there is one."""
    return stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))


def ceilings(sizes: Sizes) -> list[Row]:
    """Measure what the machine can do: a product in the encoder's precision, and a copy in its memory."""
    device = here().device
    rate = matmul_rate(device, DTYPES[sizes.precision])
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return [
        Row(f"large matrix product, {sizes.precision}", round(rate / 1e12, 1), "TFLOP/s"),
        Row("copy in its memory", round(2 * sizes.copied_bytes / seconds / 1e12, 2), "TB/s"),
    ]


def encoder(sizes: Sizes) -> list[Row]:
    """Measure forward and backward of chunks, plain and compiled, and the miner's forward, for each mix of lengths."""
    world = here()
    model, tokenizer = load(sizes.model, sizes.max_tokens)
    model.to(world.device)
    pairs_of = {}
    for mix in sizes.mixes:
        num_pairs = round(sizes.encoded_tokens / sum(lengths.median for lengths in MIXES[mix]))
        path = data_of(mix, num_pairs=sizes.num_pairs)
        pairs_of[mix] = read_pairs(path, tokenizer, min(sizes.num_pairs, max(2, num_pairs)), sizes.max_tokens)
    rows = []
    for compiles in [False, True] if sizes.compiles else [False]:
        how = encoded_by(model, model, sizes.precision, world.device, compiles)
        for mix, pairs in pairs_of.items():
            rows += _of_mix(model, pairs, pairs.batch(len(pairs), how), mix, sizes, world)
    return rows


def _of_mix(model: Encoder, pairs: Pairs, batch: Batch, mix: str, sizes: Sizes, world: World) -> list[Row]:
    device, dtype = world.device, DTYPES[sizes.precision]
    chunks = plan_encoding(batch.towers, sizes.chunk_tokens, 0, 0, 0).chunks

    def forward_and_backward() -> None:
        for chunk in chunks:
            encode_chunk(chunk, with_graph=True).sum().backward()

    def forward() -> None:
        for table in pairs.tables:
            encode_rows(model, table, np.arange(len(pairs)), dtype=dtype)

    ways = {BOTH: forward_and_backward} | ({} if model.is_compiled else {FORWARD: forward})  # a miner's layers are plain
    turns = take_turns(ways, sizes.rounds, world, functools.partial(model.zero_grad, set_to_none=True))
    flops, rate, tokens = forward_flops(model, pairs.lengths), matmul_rate(device, dtype), int(pairs.lengths.sum())
    found = []
    for name in ways:
        what = f"{sizes.model}, {name}, {mix}"
        if name not in turns:
            found.append(Row(what, None, "of the rate", WANTED[name], word="out of memory"))
            continue
        share, per_s = (3 if name == BOTH else 1) * flops / turns[name].median_s / rate, tokens / turns[name].median_s
        found.append(Row(what, round(share, 3), "of the rate", WANTED[name], word=_how(model)))
        wanted = WANTED_TOKENS_PER_S / 1e6 if name == FORWARD and sizes.model == "bert-base" else None
        found.append(Row(what, round(per_s / 1e6, 6), "M tokens/s", wanted))
    return found


def step(sizes: Sizes) -> list[Row]:
    """Measure a whole cached step that keeps no graph, against sentence-transformers at its best."""
    bench = _bench(sizes, sizes.model)
    setting, word = None, ""
    ways = {NONE_KEPT: functools.partial(bench.ours, bench.pairs, len(bench.pairs), 0)}
    try:
        theirs: Peer = bench.add_peer()
    except InputError:
        word = "not installed"
    else:
        device = bench.world.device
        setting = best_setting(theirs.trials(min(TRIAL_PAIRS[device.type], len(bench.pairs)), bench.free_gradients), device)
        word = "out of memory"
    if setting is not None:
        ways[PEER] = functools.partial(theirs.step, len(bench.pairs), setting)
        word = named(setting)
    turns = bench.rounds(ways, sizes.rounds)
    ours_s = turns[NONE_KEPT].median_s
    speeds = bench.speeds(ours_s, 4, bench.rate())
    times = round(turns[PEER].median_s / ours_s, 2) if PEER in turns else None
    what = f"{sizes.model}, cached step of {len(bench.pairs):,} pairs"
    rows = [
        Row(what, speeds["share_of_matmul_rate"], "of the rate", WANTED["step"], word=_how(bench.encoder)),
        Row(what, round(ours_s, 4), "s"),
        Row(f"{sizes.model}, step", times, "times as fast as sentence-transformers", WANTED["times"], word=word),
    ]
    return rows + _host(bench, sizes.model, 0.95)


def small_step(sizes: Sizes) -> list[Row]:
    """Measure a cached step of a small model, in which the host sets the pace."""
    bench = _bench(sizes, sizes.small_model)
    ours_s = bench.rounds({NONE_KEPT: lambda: bench.ours(bench.pairs, len(bench.pairs), 0)}, sizes.rounds)[NONE_KEPT].median_s
    speeds = bench.speeds(ours_s, 4, bench.rate())
    what = f"{sizes.small_model}, cached step of {len(bench.pairs):,} pairs"
    rows = [
        Row(what, speeds["share_of_matmul_rate"], "of the rate", word=_how(bench.encoder)),
        Row(what, round(speeds["tokens_per_rank_per_s"] / 1e6, 6), "M tokens/s"),
    ]
    return rows + _host(bench, sizes.small_model, 0.80)


def _how(model: Encoder) -> str:
    return "compiled" if model.is_compiled else "not compiled"


def _bench(sizes: Sizes, model: str) -> StepBench:
    data = data_of(STEP_DATA, num_pairs=sizes.num_pairs)
    found = StepBench(here(), data, model, sizes.step_pairs, sizes.max_tokens, sizes.precision, sizes.compiles)
    found.chunk_tokens = sizes.chunk_tokens
    return found


def _host(bench: StepBench, model: str, wanted_busy: float) -> list[Row]:
    """Return how busy a step keeps the GPU, and how often the host waits for it."""
    work = functools.partial(bench.ours, bench.pairs, len(bench.pairs), 0)
    device = bench.world.device
    bench.free_gradients()
    work()
    busy = busy_share(work, PROFILED_STEPS, device)
    waits = count_waits(work, device)
    bench.chunk_tokens //= 2
    work()  # what is new to its shapes is compiled
    more = count_waits(work, device) - waits
    bench.chunk_tokens *= 2
    word = "" if busy is not None else "the profile has no kernels"
    return [
        Row(f"{model}, step", None if busy is None else round(busy, 3), "of the time the GPU is busy", wanted_busy, word=word),
        Row(f"{model}, step", waits, "waits of the host for the GPU"),
        Row(f"{model}, step of twice the chunks", more, "waits more", 0, less_is_better=True),
    ]
