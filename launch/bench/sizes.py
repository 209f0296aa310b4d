"""How much each line of `negpool bench gpu` measures: on a GPU by the defaults, in tests a thousandth of it."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from launch.bench.exact_search import SearchSize


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all lines."""

    rounds: int = 3  # turns of everybody in a line; medians are shown
    model: str = "bert-base"
    small_model: str = "minilm"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compiles: bool = True  # the model's layers, as a job that is long enough does
    max_tokens: int = 256  # of a text
    mixes: tuple[str, ...] = ("made-256", "made-64", "made-mixed")  # lengths of texts, see made_texts.py
    num_pairs: int = 8192  # of a made data set
    chunk_tokens: int = 65536
    encoded_tokens: int = 4 * 65536  # of each mix
    step_pairs: int = 8192
    copied_bytes: int = 2**32
    loss_rows: int = 65536  # and as many columns
    pool: tuple[int, int] = (4096, 1048576)  # rows and columns of the loss against a large pool
    width: int = 768  # of an embedding in the loss
    search: SearchSize = field(
        default_factory=lambda: SearchSize(queries=32768, passages=1048576, width=768, dtype=torch.float16)
    )
    refreshed: int = 196608  # passages of a refresh; a query for every 20
    indexed: tuple[int, int] = (16384, 262144)  # queries and passages of an index on a GPU
    job_queries: int = 512  # of a step of the small job
    job_steps: int = 60
    job_s: float = 90.0  # that the small job may take
