"""The same proofs where the tensors live on a GPU."""

import numpy as np
import pytest

from gradcache import OBJECTIVES, NoSync, Temperature, cached_step, reference_step
from mining.index import FaissIndex, IndexSettings, build_indexes
from tests.gradcache.test_step import build, make_batch, named
from tests.gradients import assert_same_gradients
from trainer.encoder.topk import top_k

pytestmark = pytest.mark.gpu
OPTIONS = {"chunk_tokens": 35, "seed": 3, "step": 7, "symmetric": True}


def on_gpu(encoder):
    """Return an encoder whose inputs are brought to the GPU."""
    return lambda inputs: encoder({name: tensor.cuda() for name, tensor in inputs.items()})


@pytest.mark.parametrize("keep_graphs", [0, 2, "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_references_on_a_gpu(keep_graphs, dropout):
    found = []
    for step in ("cached", "reference"):
        encoders, temperature = [e.cuda() for e in build(1, dropout)], Temperature(0.1, learnable=True).cuda()
        batch = make_batch(0, 6, [on_gpu(e) for e in encoders])
        if step == "cached":
            cached_step(
                batch,
                objective=OBJECTIVES["info_nce"],
                temperature=temperature,
                sync=NoSync(),
                group=None,
                keep_graphs=keep_graphs,
                **OPTIONS,
            )
        else:
            reference_step([batch], objective=OBJECTIVES["info_nce"], temperature=temperature, **OPTIONS)
        found.append(named(encoders, temperature))
    assert_same_gradients(*found)


class OneShard:
    """Passages in memory, as `build_indexes` reads them."""

    def __init__(self, passage_ND):
        self.passage_ND = passage_ND
        self.shards = self

    def shard(self, number):
        return self.passage_ND

    def rows(self, number):
        return np.arange(len(self.passage_ND))


def test_a_faiss_index_on_a_gpu_finds_what_exact_search_finds():
    faiss = pytest.importorskip("faiss")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("needs faiss-gpu")
    draw = np.random.default_rng(0)
    passage_ND, query_QD = (draw.standard_normal((n, 32)).astype(np.float32) for n in (5000, 7))
    (index,) = build_indexes(IndexSettings(factory="Flat"), OneShard(passage_ND), [0], np.ones(5000, bool), 0)
    assert isinstance(index, FaissIndex)
    scores, ids = index.search(query_QD, 10)
    wanted_scores, wanted_ids = top_k(query_QD, passage_ND, 10)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
