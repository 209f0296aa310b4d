"""The table of negatives: what the miner writes is what the trainer maps, or it is refused."""

import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest

from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, read_latest
from trainer.handoff.margins import Margins
from trainer.handoff.negatives import BLOCK, negatives_folder, open_negatives, publish_negatives
from trainer.handoff.settings import NegativesSettings, ScheduleEntry

INDPTR, IDS, SCORES = np.array([0, 2, 2, 3]), np.array([5, 1, 0]), np.array([0.5, 0.25, -0.125], np.float32)


def test_the_trainer_maps_what_the_miner_published(tmp_path):
    publish_negatives(tmp_path, 3, INDPTR, IDS, SCORES, {"checkpoint_step": 40})
    negatives = open_negatives(tmp_path, "v000003", num_queries=3, num_passages=6)
    assert isinstance(negatives.ids, np.memmap)
    np.testing.assert_array_equal(negatives.indptr, INDPTR)
    np.testing.assert_array_equal(negatives.ids, IDS)
    np.testing.assert_array_equal(negatives.scores, SCORES)
    assert (negatives.version, negatives.checkpoint_step, negatives.num_queries) == (3, 40, 3)
    assert read_latest(negatives_folder(tmp_path)) == "v000003"


def test_teacher_scores_and_clusters_are_kept_where_there_are_any(tmp_path):
    teacher, clusters = np.arange(len(IDS), dtype=np.float32), np.array([2, 0, 2])
    publish_negatives(tmp_path, 1, INDPTR, IDS, SCORES, {}, teacher_scores=teacher, clusters=clusters)
    negatives = open_negatives(tmp_path, "v000001", 3, 6)
    np.testing.assert_array_equal(negatives.teacher_scores, teacher)
    np.testing.assert_array_equal(negatives.clusters, clusters)
    publish_negatives(tmp_path, 2, INDPTR, IDS, SCORES, {}, clusters=clusters[:2])
    with pytest.raises(TornVersion, match="does not fit"):
        open_negatives(tmp_path, "v000002", 3, 6)


def test_margins_to_each_positive_need_the_scores_of_the_positives(tmp_path):
    margins = Margins(
        positive="each", relative_margin=0.05, absolute_margin="off", adaptive_margin=(0.1, 0.2), teacher_margin="off"
    )
    fields = {"margins": asdict(margins)}
    publish_negatives(tmp_path, 1, INDPTR, IDS, SCORES, fields, positive_scores=np.array([0.9, 0.5, 0.2]))
    negatives = open_negatives(tmp_path, "v000001", 3, 6)
    assert negatives.margins is not None and negatives.margins.teacher_margin == "off"
    # .5 is below .9 - (.1 + .2 * .9), and not below .5's margins
    assert negatives.admit(np.array([0, 1]), np.array([[0], [1], [2]])).tolist() == [[True, True], [False, True], [False, False]]
    publish_negatives(tmp_path, 2, INDPTR, IDS, SCORES, fields)
    publish_negatives(
        tmp_path, 3, INDPTR, IDS, SCORES, {"margins": {**asdict(margins), "teacher_margin": 0.1}}, positive_scores=IDS
    )
    publish_negatives(tmp_path, 4, INDPTR, IDS, SCORES, {"margins": {"positive": "each", "of": 1}}, positive_scores=IDS)
    for name in ("v000002", "v000003", "v000004"):
        with pytest.raises(TornVersion):
            open_negatives(tmp_path, name, 3, 6)
    publish_negatives(tmp_path, 5, INDPTR, IDS, SCORES, {"margins": {**asdict(margins), "positive": "best"}})
    assert open_negatives(tmp_path, "v000005", 3, 6).margins is None


def test_a_table_of_other_data_with_as_many_rows_is_refused(tmp_path):
    publish_negatives(tmp_path, 0, INDPTR, IDS, SCORES, {"data_digest": "a" * 64})
    assert open_negatives(tmp_path, "v000000", 3, 6, "a" * 64).num_queries == 3
    with pytest.raises(TornVersion, match="was mined from other data"):
        open_negatives(tmp_path, "v000000", 3, 6, "b" * 64)


@pytest.mark.parametrize("num_queries, num_passages", [(2, 6), (4, 6), (3, 5)])
def test_a_table_for_other_data_is_refused(tmp_path, num_queries, num_passages):
    publish_negatives(tmp_path, 0, INDPTR, IDS, SCORES, {})
    with pytest.raises(TornVersion, match="does not fit"):
        open_negatives(tmp_path, "v000000", num_queries, num_passages)


def wrong_id(ids, indptr):
    ids[-1] = 5


def negative_id(ids, indptr):
    ids[len(ids) // 2] = -1


def falling_indptr(ids, indptr):
    at = BLOCK  # the last of one block with the first of the next
    indptr[at], indptr[at + 1] = indptr[at + 1], indptr[at]


@pytest.mark.parametrize("damage", [None, wrong_id, negative_id, falling_indptr])
def test_a_table_is_looked_through_in_blocks(tmp_path, damage):
    num_queries = 16 * BLOCK + 10
    indptr, ids = np.arange(num_queries + 1) * 4, np.zeros(4 * num_queries, np.int64)
    if damage is not None:
        damage(ids, indptr)
    publish_negatives(tmp_path, 0, indptr, ids, np.zeros(len(ids), np.float32), {})
    tracemalloc.start()
    try:
        if damage is None:
            open_negatives(tmp_path, "v000000", num_queries, 5)
        else:
            with pytest.raises(TornVersion, match="does not fit"):
                open_negatives(tmp_path, "v000000", num_queries, 5)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One answer for each of the ids would be 4 MB, the differences of indptr 8 MB.
    assert peak_bytes < 4 * 8 * BLOCK < len(ids) / 2


def test_a_pickled_table_is_never_loaded(tmp_path):
    publish_negatives(tmp_path, 0, INDPTR, IDS, SCORES, {})
    folder = negatives_folder(tmp_path) / "v000000"
    np.save(folder / "ids.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TornVersion):
        open_negatives(tmp_path, "v000000", 3, 6)


def test_a_schedule_out_of_order_is_refused():
    with pytest.raises(InputError, match=r"negatives\.schedule is not in order"):
        NegativesSettings(schedule=(ScheduleEntry(checkpoint=10, step=20), ScheduleEntry(checkpoint=10, step=20)))
    with pytest.raises(InputError, match="later checkpoint"):
        NegativesSettings(schedule=(ScheduleEntry(checkpoint=30, step=20),))
