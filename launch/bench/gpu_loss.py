"""Lines of `negpool bench gpu` without an encoder: the loss against bare products."""

from launch.bench.gpu_encoder import here
from launch.bench.lines import Row
from launch.bench.loss import OURS, measure_size
from launch.bench.sizes import Sizes
from trainer.encoder.encode import DTYPES

WANTED = {"ms": 40.0, "ratio": 1.3}


def loss(sizes: Sizes) -> list[Row]:
    """Measure the loss of a square and its gradients, from embeddings."""
    return _loss(sizes, sizes.loss_rows, sizes.loss_rows, WANTED["ms"])


def pool(sizes: Sizes) -> list[Row]:
    """Measure the same of few rows against a large pool."""
    return _loss(sizes, *sizes.pool, None)


def _loss(sizes: Sizes, rows: int, columns: int, wanted_ms: float | None) -> list[Row]:
    found = measure_size(here(), rows, columns, sizes.width, DTYPES[sizes.precision], sizes.rounds)["sides"][OURS]
    what = f"loss, {rows:,} x {columns:,}, D {sizes.width}"
    return [
        Row(what, round(1000 * found["seconds"], 2), "ms", wanted_ms, less_is_better=True),
        Row(what, found["ratio"], "bare products", WANTED["ratio"], less_is_better=True),
        Row(what, found["peak_gib"], "GiB", less_is_better=True, word="beyond the embeddings"),
    ]
