"""Factory strings: what they stand for, what they take, and what is none."""

import faiss
import numpy as np
import pytest

from mining.find.index import bytes_of_passage, empty_index, is_exact, ivf_of, least_trained, num_lists, num_trained
from mining.find.rates import clustered
from trainer.errors import InputError

WIDTH = 16


def test_what_is_no_factory_string_is_refused_in_a_sentence():
    for factory in ("IFV8", "IVF8,PQ5", "IVF8,Flat,Nothing"):  # 16 dimensions are not five parts
        with pytest.raises(InputError, match=rf"index\.factory='{factory}' is not a FAISS index for 16 dimensions; expected "):
            empty_index(factory, WIDTH)


def test_exact_search_needs_no_faiss_under_either_name():
    assert [is_exact(factory) for factory in ("exact", "Flat", "IVF8,Flat", "HNSW8")] == [True, True, False, False]
    assert bytes_of_passage("Flat", WIDTH) == num_trained("Flat", 10**6) == 0


def test_what_refines_is_left_out_and_lists_are_found_behind_rotations():
    for factory in ("IVF8,SQ8", "IVF8,SQ8,RFlat", "PCA8,IVF8,SQ8,Refine(SQfp16)"):
        assert ivf_of(faiss, empty_index(factory, WIDTH)).nlist == 8 and num_lists(factory) == 8
        assert not isinstance(empty_index(factory, WIDTH), faiss.IndexRefine)
    assert num_lists("OPQ16,IVF2k_HNSW32,PQ16") == 2048 and num_lists("HNSW8") == 0


def test_training_takes_64_a_list_at_most_and_has_a_least():
    assert num_trained("IVF1024,Flat", 10**7) == 65536 and num_trained("IVF1024,Flat", 500) == 500
    assert num_trained("IVF8,PQ4", 10**7) == 64 * 256 and num_trained("HNSW8", 10**7) == 0
    least = {
        "IVF8,Flat": 8,
        "IVF8,PQ4": 256,
        "IVF8,PQ4x4": 16,
        "PCA8,IVF8,Flat": 16,
        "HNSW8": 1,
        "OPQ4,IVF8,PQ4": 256,
        "PQ4": 256,
    }
    assert {factory: least_trained(faiss, empty_index(factory, WIDTH)) for factory in least} == least


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,PQ4", "IVF8,PQ4x4", "PCA8,IVF8,Flat", "PQ4"])
def test_the_least_that_training_needs_is_enough(factory):
    index = empty_index(factory, WIDTH)
    index.train(clustered(least_trained(faiss, index), WIDTH))
    assert index.is_trained


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "HNSW16", "SQ8"])
def test_an_index_takes_the_bytes_that_are_planned(factory):
    index = empty_index(factory, WIDTH)
    index.train(clustered(4000, WIDTH))
    index.add(clustered(4000, WIDTH))
    held = (len(faiss.serialize_index(index)) - 500) / 4000 + 2  # without the state; and what we know of each passage
    if factory == "SQ8":
        held += 8  # the id
    assert held <= bytes_of_passage(factory, WIDTH) <= 1.4 * held


def test_a_state_has_the_same_bytes_whatever_the_threads():
    sample, states = clustered(4096, WIDTH), []
    for num_threads in (1, 2, 3):
        faiss.omp_set_num_threads(num_threads)
        try:
            index = empty_index("IVF64,SQ8", WIDTH)
            index.train(sample)
        finally:
            faiss.omp_set_num_threads(1)
        states.append(faiss.serialize_index(index))
    for other in states[1:]:
        np.testing.assert_array_equal(other, states[0])
