"""`negpool run --dry-run`: what a run would do, before anything starts: steps, memory, time, refreshes of the negatives, disk.

Counts are exact where the job gives them. Time comes from a few texts that go through the model on this machine, once without
and once with gradients, alone on it; side by side the two sides slow each other down, and nothing is known of other machines.
"""

import math
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradcache.budget import BACKWARD_SHARE, MOST_CHUNK_TOKENS
from gradcache.loss_memory import LossSizes
from launch.foreseen_warnings import warnings_of_job, warnings_of_plan
from launch.jobfile import Jobs
from launch.shares import Shares, cores_and_gpus, share_out
from mining.disk import budget
from mining.find.index import bytes_of_passage, num_trained
from mining.memory import FREE_SHARE, MemoryPlan, Sizes, held_now, plan_memory
from mining.settings import AUTO, EXACT
from mining.table.clusters import num_clustered
from trainer.budget import own_bytes
from trainer.data.datasets import RetrievalData, open_data
from trainer.encoder.auto import encode_on, takes_bf16
from trainer.encoder.encode import DTYPES
from trainer.encoder.model import check_model, load_encoder
from trainer.fits import check_sizes
from trainer.job import TrainJob
from trainer.precision import precision_on
from trainer.step_memory import model_memory, step_memory
from trainer.tasks import loss_options

SAMPLED, PASSED = 1000, 16  # texts whose lengths are measured; texts that go through the model
GIB = 2**30
BYTES_OF_PARAMETER = 16  # of a checkpoint: the exported model, the weights and AdamW's two moments, in float32


def foresee(jobs: Jobs) -> dict[str, Any]:
    """Return what a job's run would do; raises InputError for a job that cannot be run. Nothing is started or kept."""
    train = jobs.train
    data = open_data(train.data, train.sources)
    shares = share_out(jobs.launch, *cores_and_gpus(os.environ))
    check_sizes(train, data, shares.train_ranks)
    jobs = settled(jobs, shares)
    check_model(train.model.name)
    encoder, tokenizer, traits = load_encoder(train.model)
    lengths = {
        "query": token_lengths(data.queries, tokenizer, traits.query_prefix, traits.max_query_tokens),
        "passage": token_lengths(data.corpus, tokenizer, traits.passage_prefix, traits.max_passage_tokens),
    }
    counts = count_steps(jobs, data, shares, {side: float(found.mean()) for side, found in lengths.items()})
    rates = measure_rates(encoder.side("passage"), lengths["passage"], shares, DTYPES[jobs.train.precision.encode])
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    found = {
        "run": str(train.run.folder),
        "data": {"path": str(data.path), "queries": counts["queries"], "passages": len(data.corpus)},
        "shares": str(shares),
        "steps": counts,
        "memory": {
            "trainer": trainer_memory(jobs, shares, encoder, counts, rates["graph_bytes_per_token"]),
            "miner": miner_memory(jobs, data, shares, encoder.width),
        },
        "time": foresee_time(jobs, data, shares, counts, rates),
        "disk_gib": round(disk_bytes(jobs, data, counts["queries"], encoder.width, num_parameters) / GIB, 3),
    }
    length = "optim.epochs" if train.optim.steps is None else "optim.steps"
    warnings = [*warnings_of_job(jobs, data), *warnings_of_plan(found, shares, train.negatives.per_query != 0, length)]
    return found | {"warnings": warnings}


def settled(jobs: Jobs, shares: Shares) -> Jobs:
    """Return the jobs with what "auto" stands for in precisions on the device of each side."""
    trains, mines = (torch.device("cuda" if gpus else "cpu") for gpus in (shares.train_gpus, shares.mine_gpus))
    train = replace(jobs.train, precision=precision_on(jobs.train.precision, takes_bf16(trains)))
    return Jobs(train, replace(jobs.mine, encode=encode_on(jobs.mine.encode, mines)), jobs.launch, jobs.given)


def count_steps(jobs: Jobs, data: RetrievalData, shares: Shares, mean_tokens: dict[str, float]) -> dict[str, Any]:
    """Return steps, queries, passages and tokens; mean_tokens: of a text, by side."""
    train = jobs.train
    num_queries, batch = len(data.training_queries(train.data.train_split)), train.batch.queries
    per_epoch = max(1, math.ceil(num_queries / batch))
    steps = steps_of(train, num_queries, batch)
    assert steps is not None
    per_query = jobs.mine.sample.num_negatives if train.negatives.per_query == "all" else train.negatives.per_query
    passages = batch * (1 + per_query)
    tokens = batch * mean_tokens["query"] + passages * mean_tokens["passage"]
    corpus = len(data.corpus) * mean_tokens["passage"]
    return {
        "queries": num_queries,
        "steps": steps,
        "epochs": round(steps / per_epoch, 2),
        "per_epoch": per_epoch,
        "queries_a_step": batch,
        "passages_a_step": passages,
        "tokens_a_step_and_rank": round(tokens / shares.train_ranks),
        "tokens_of_corpus": round(corpus),
        "tokens_of_refresh": round(corpus + num_queries * mean_tokens["query"]),
        "is_exact": train.batch.mode == "mixed",
    }


def steps_of(train: TrainJob, num_queries: int | None, batch: int) -> int | None:
    """Return the steps of a run; None where they depend on the number of training queries, and that is not known."""
    if train.optim.steps is not None or num_queries is None:
        return train.optim.steps
    return max(1, math.ceil(train.optim.epochs * max(1, math.ceil(num_queries / batch))))


def measure_rates(encoder: Any, lengths: np.ndarray, shares: Shares, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return the seconds of a token without and with gradients, and the bytes of its graph, for texts of usual length.

    dtype: of the encoder's products (autocast).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    length = max(2, int(np.median(lengths)))
    ids = torch.randint(0, encoder.model.get_input_embeddings().num_embeddings, (PASSED, length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    threads, tokens, held = torch.get_num_threads(), PASSED * length, 0

    def encode() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return encoder(inputs)

    def without_gradient() -> None:
        with torch.inference_mode():
            encode()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.nbytes if tensor.device.type == device.type and not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    torch.set_num_threads(shares.threads)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encode().sum().backward()  # the first pass loads what it needs
        forward_s, both_s = (
            _seconds(without_gradient),
            _seconds(lambda: encode().sum().backward()),
        )
    finally:
        torch.set_num_threads(threads)
        encoder.zero_grad(set_to_none=True)
    return {"forward_s": forward_s / tokens, "both_s": both_s / tokens, "graph_bytes_per_token": held / tokens, "texts": PASSED}


def trainer_memory(jobs: Jobs, shares: Shares, encoder: Any, counts: dict[str, Any], bytes_of_token: float) -> dict[str, float]:
    """Return GiB of a trainer rank by what takes them: the plan that the trainer makes itself, with graphs as they are here."""
    train, device = jobs.train, torch.device("cuda" if shares.train_gpus else "cpu")
    tokens = counts["tokens_a_step_and_rank"]
    if train.chunk.keep_graphs != "all":
        most = MOST_CHUNK_TOKENS[device.type] if train.chunk.tokens == "auto" else train.chunk.tokens
        tokens = min(tokens, most)
    sizes = LossSizes(
        queries=counts["queries_a_step"],
        passages=counts["passages_a_step"],
        width=encoder.width,
        num_ranks=shares.train_ranks,
    )
    model = model_memory(encoder, train, shares.train_ranks, device.type, is_first=True)
    limit = train.chunk.memory_gib * GIB if train.chunk.memory_gib is not None else own_bytes(device)
    memory = step_memory(model, loss_options(train.loss, train.precision), sizes, device, limit)
    graph = int(BACKWARD_SHARE * tokens * bytes_of_token)
    found = replace(memory, chunk=graph).in_gib()
    return found | {"libraries": 0.0 if shares.train_gpus else round(max(0, held_now() - memory.weights) / GIB, 3)}


def miner_memory(jobs: Jobs, data: RetrievalData, shares: Shares, width: int) -> dict[str, Any]:
    """Return the miner's own plan of a rank, as mining/memory.py makes it."""
    import psutil

    num_queries = len(data.training_queries(jobs.train.data.train_split))
    sizes = miner_sizes(jobs, num_queries, len(data.corpus), width, shares.mine_ranks, "cuda" if shares.mine_gpus else "cpu")
    mine = jobs.mine
    free = int(held_now() + FREE_SHARE * psutil.virtual_memory().available / shares.mine_ranks)
    limit = free if mine.mine.memory_gib is None else int(mine.mine.memory_gib * GIB)
    plan: MemoryPlan = plan_memory(sizes, held_now(), limit)
    return plan.as_json()


def miner_sizes(jobs: Jobs, num_queries: int, num_passages: int, width: int, num_ranks: int, device_type: str) -> Sizes:
    """Return what decides about the memory of a miner's rank."""
    from trainer.encoder.shards import rows_of_shard

    mine = jobs.mine
    factory = EXACT if mine.index.factory == AUTO else mine.index.factory
    return Sizes(
        num_queries=num_queries,
        num_passages=num_passages,
        shard_rows=rows_of_shard(num_passages),
        width=width,
        stored_bytes=np.dtype(mine.encode.stored_type).itemsize,
        token_width=4 * width,
        top_k=mine.search.top_k,
        num_candidates=mine.num_candidates,
        num_known=mine.num_known(num_queries, num_queries),
        num_clustered=num_clustered(mine.clusters, num_queries),
        num_ranks=num_ranks,
        index_bytes=bytes_of_passage(factory, width),
        num_trained=num_trained(factory, num_passages),
        device_type=device_type,
    )


def foresee_time(
    jobs: Jobs, data: RetrievalData, shares: Shares, counts: dict[str, Any], rates: dict[str, float]
) -> dict[str, Any]:
    """Return seconds of a step, an evaluation, a refresh and all of them, and at which steps negatives are swapped in."""
    train = jobs.train
    passes = rates["both_s"] + (0 if train.chunk.keep_graphs == "all" else rates["forward_s"])
    step_s = counts["tokens_a_step_and_rank"] * passes
    corpus_s = counts["tokens_of_corpus"] * rates["forward_s"]
    evaluation_s = corpus_s / shares.train_ranks
    times = 2 * (train.eval.split in data.qrels)
    if train.eval.every_steps is not None:
        times += 2 + (counts["steps"] - 1) // train.eval.every_steps  # on dev before the first step and after the last, too
    refresh_s = counts["tokens_of_refresh"] * rates["forward_s"] / shares.mine_ranks
    swaps = swap_steps(counts["steps"], train.checkpoint.every_steps, refresh_s / step_s) if train.negatives.per_query else []
    if train.negatives.schedule:
        swaps = [entry.step for entry in train.negatives.schedule]
    total_s = counts["steps"] * step_s + times * evaluation_s
    found = {"step_s": step_s, "evaluation_s": evaluation_s, "refresh_s": refresh_s, "total_s": total_s}
    return {**{name: round(value, 4) for name, value in found.items()}, "evaluations": times, "swaps": swaps, "texts": PASSED}


def swap_steps(num_steps: int, every: int, refresh_steps: float) -> list[int]:
    """Return the steps at which mined negatives come into force, where the miner always takes the newest checkpoint.

    refresh_steps: how many steps a refresh takes as long as.
    """
    swaps: list[int] = []
    mined, free = -1, 0.0  # the checkpoint mined last, and the step at which the miner is free again
    while True:
        newest = int(free // every) * every
        mined = newest if newest > mined else mined + every
        free = max(free, mined) + refresh_steps
        if math.ceil(free) >= num_steps:
            return swaps
        swaps.append(math.ceil(free))


def disk_bytes(jobs: Jobs, data: RetrievalData, num_queries: int, width: int, num_parameters: int) -> int:
    """Return the bytes of the run folder at its largest: checkpoints and one more, and what the miner keeps and works on."""
    mined = sum(budget(jobs.mine, num_queries, len(data.corpus), width))
    return (jobs.train.checkpoint.keep + 1) * num_parameters * BYTES_OF_PARAMETER + mined


def token_lengths(texts: Any, tokenizer: Any, prefix: str, most: int) -> np.ndarray:
    """Return the tokens of a sample of texts, as the encoder gets them."""
    rows = np.unique(np.linspace(0, len(texts) - 1, min(SAMPLED, len(texts))).astype(int))
    sample = [prefix + text for text in texts[rows]["text"]]
    return np.array([len(ids) for ids in tokenizer(sample, truncation=True, max_length=most)["input_ids"]])


def _seconds(work: Any) -> float:
    _settle()
    started = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - started


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
