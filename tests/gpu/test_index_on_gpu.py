"""An index of lists on a GPU against the same index on a CPU: the same lists, nearly the same neighbours."""

import faiss
import numpy as np
import pytest
import torch

from mining.find.approximate import ApproximateFinder
from mining.find.entries import Entries
from mining.find.on_gpu import GPU_MOST, nearest_lists
from mining.find.rates import clustered
from mining.find.trained import train_index
from mining.table.audit import recall_of_each
from tests.mining.find.texts import Table
from trainer.encoder.topk import best_of_keys, top_k

NUM, WIDTH, SHARD_ROWS, K = 20_000, 64, 2048, 50
pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def texts():
    return clustered(NUM, WIDTH), clustered(300, WIDTH, seed=1)


def find(texts, factory, index, device, nprobe=8, k=K):
    """Return a finder that has seen all shards, as they come from an encoder on the device, and (scores, ids)."""
    passage_ND, query_QD = texts
    finder = ApproximateFinder(factory, index, Entries(np.ones(NUM, bool)), Table(query_QD), k, SHARD_ROWS, device)
    for shard in range(-(-NUM // SHARD_ROWS)):
        finder.see(shard, torch.from_numpy(passage_ND[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]).to(device))
    finder.set_nprobe(nprobe)
    return finder, best_of_keys([finder.keys(slice(0, len(query_QD)))], finder.depth)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16", "PCA32,IVF64,Flat"])
def test_lists_on_a_gpu_find_what_they_find_on_a_cpu(texts, factory):
    state = faiss.serialize_index(train_index(factory, texts[0][:8192], torch.device("cpu")))
    found = [find(texts, factory, faiss.deserialize_index(state), device) for device in (torch.device("cpu"), GPU)]
    (on_cpu, (_, cpu_ids)), (on_gpu, (_, gpu_ids)) = found
    assert np.abs(on_cpu.list_sizes() - on_gpu.list_sizes()).sum() <= 4  # of 20,000, by last bits between two lists
    exact_ids = top_k(texts[1], texts[0], K)[1]
    recalls = [recall_of_each(ids, exact_ids).mean() for ids in (cpu_ids[:, : 2 * K], gpu_ids)]
    assert not on_gpu.is_exact and on_gpu.depth == 2 * K
    if factory.endswith("IVF64,Flat"):  # exactly K are cut there and 2 K here
        assert recalls[1] >= recalls[0] - 0.002
    else:
        assert abs(recalls[1] - recalls[0]) <= 0.002


def test_more_neighbours_than_a_gpu_gives_are_found_on_the_cpu(texts):
    index = train_index("IVF64,Flat", texts[0][:8192], GPU)  # trained there, too
    _, (_, ids) = find(texts, "IVF64,Flat", index, GPU, nprobe=64, k=GPU_MOST)
    assert (ids >= 0).all() and recall_of_each(ids, top_k(texts[1], texts[0], GPU_MOST)[1]).mean() > 0.999


def test_the_list_of_a_passage_does_not_depend_on_what_comes_with_it(texts):
    index = train_index("IVF64,Flat", texts[0][:8192], torch.device("cpu"))
    vectors = torch.from_numpy(texts[0][:1000]).to(GPU)
    whole = nearest_lists(faiss, index, index, vectors, np.arange(1000), 256)
    np.testing.assert_array_equal(nearest_lists(faiss, index, index, vectors, np.arange(1000)[256:700], 256), whole[256:700])
