"""Pairs scored while their shards pass by on a GPU: near to float64, and to the bit what they score when they are asked for."""

import numpy as np
import pytest
import torch

from tests.mining.find.test_known_pairs import SOURCES, expected_pairs, of_tiles
from tests.mining.find.world import NUM_QUERIES, World
from tests.mining.threads import on_threads

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_known_pairs_have_the_bits_of_those_that_are_asked_for(tmp_path, stored):
    world = World(tmp_path, stored, f"cuda:{torch.cuda.current_device()}")
    places = slice(0, NUM_QUERIES)

    def go(ranks):  # one rank, so one thread uses the GPU
        known, asker = world.known(ranks, world.owners(1), SOURCES), world.asker(ranks, world.owners(1))
        query_n, row_n, scores = of_tiles(ranks, places, 70, lambda tile: known.bring(ranks, tile))
        order = np.random.default_rng(0).permutation(len(row_n))
        parts = [asker.ask_scores(query_n[part], row_n[part]) for part in np.array_split(order, 3)]
        return query_n, row_n, scores, scores[order], np.concatenate(parts)

    query_n, row_n, scores, expected, asked = on_threads(1, go)[0]
    assert list(zip(query_n.tolist(), row_n.tolist(), strict=True)) == expected_pairs(places)
    np.testing.assert_allclose(scores, world.exact[query_n, row_n], atol=1e-6)  # sums of 24 in float32
    assert expected.tobytes() == asked.tobytes()
