"""Lines of `negpool bench gpu` about mining: exact search, a whole refresh, and FAISS on a GPU where there is one."""

import tempfile
from pathlib import Path

from launch.bench.exact_search import measure_search
from launch.bench.gpu_encoder import STEP_DATA, here
from launch.bench.lines import LeftOut, Row
from launch.bench.made_texts import write_made
from launch.bench.recall import Searched, made_embeddings, measure_index
from launch.bench.shapes import model_of
from launch.bench.sizes import Sizes
from launch.bench.whole_refresh import Corpus, measure_refresh
from mining.find.index import load_faiss, num_gpus_of
from mining.find.rates import clustered
from trainer.errors import InputError

WANTED = {"search": 0.6, "refresh": 1.15}
PROMISED_REFRESH = "1,000,000 x 50,000"  # takes too long for this bench; what is beside the encoding weighs less in it
PASSAGES_OF_QUERY = 20


def search(sizes: Sizes) -> list[Row]:
    """Measure exact search over float16 embeddings on the device, shard by shard."""
    found = measure_search(sizes.search, here(), sizes.rounds, {})
    what = f"search, {found['queries']:,} x {found['passages']:,}, D {found['width']}, k {found['top_k']}"
    word = f"of a product in {found['precision']}"
    return [
        Row(what, round(1000 * found["sides"]["ours"]["seconds"], 2), "ms", less_is_better=True),
        Row(what, found["share_of_matmul_rate"], "of the rate", WANTED["search"], word=word),
    ]


def refresh(sizes: Sizes) -> list[Row]:
    """Measure a whole refresh against bare encoding, once each behind a first time."""
    with tempfile.TemporaryDirectory() as name:
        write_made(Path(name) / "data", STEP_DATA, sizes.refreshed // PASSAGES_OF_QUERY, sizes.refreshed)
        corpus = Corpus(Path(name), model_of(sizes.model), sizes.max_tokens, sizes.precision)
        found = measure_refresh(corpus, 1, here(), has_product=False)
    what = f"{sizes.model}, refresh, {found['passages']:,} x {found['queries']:,}"
    ours_s = found["sides"]["ours"]["seconds"]
    word = f"scaled down from {PROMISED_REFRESH} to fit the time"
    return [
        Row(what, round(ours_s, 2), "s", less_is_better=True),
        Row(what, found["ratio"], "of bare encoding", WANTED["refresh"], less_is_better=True, word=word),
        Row(what, round(found["tokens"] / ours_s / 1e6, 6), "M tokens/s"),
    ]


def index(sizes: Sizes) -> list[Row]:
    """Measure an index of lists, its build included, against exact search."""
    device = here().device
    try:
        num_gpus = num_gpus_of(load_faiss("IVF"))
    except InputError:
        raise LeftOut("not measured: FAISS is not installed") from None
    if not num_gpus:
        raise LeftOut("not measured: this FAISS sees no GPU")
    queries, passages = sizes.indexed
    width = sizes.search.width
    found = measure_index(Searched(*made_embeddings(clustered, queries, passages, width), device))
    what = f"{found['factory']}, {queries:,} x {passages:,}, k {found['top_k']}, recall {found['recall']:.3f}"
    return [
        Row(what, round(found["index_s"], 2), "s", less_is_better=True, word="its build included"),
        Row(what, found["ratio"], "of exact search", less_is_better=True),
    ]
