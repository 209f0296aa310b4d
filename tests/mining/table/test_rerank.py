"""A tiny cross-encoder against transformers on one pair at a time, and models that are none."""

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mining.find.search import SHARE_ROWS, share_of
from mining.settings import RerankSettings
from mining.table.filters import Kept
from mining.table.rerank import drop_by_cross_encoder, open_reranker
from tests.tiny import VOCABULARY, write_tiny_cross_encoder, write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.errors import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    write_tiny_dataset(folder / "data", num_queries=120)
    for num_labels in (1, 2, 3):
        write_tiny_cross_encoder(folder / f"labels-{num_labels}", num_labels)
    write_tiny_encoder(folder / "encoder")
    return folder


def reranker(root, model="labels-1", **settings):
    data = open_dataset(root / "data", root / "cache")
    chosen = RerankSettings(model=str(root / model), **settings)
    return open_reranker(chosen, data, data.training_queries(), torch.device("cpu"))


def pairs(found, per_query=3):
    places = np.repeat(np.arange(len(found.query_rows)), per_query)
    return places, np.random.default_rng(0).integers(0, len(found.data.corpus), len(places))


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_are_those_of_the_model_pair_by_pair(root, num_labels):
    found = reranker(root, f"labels-{num_labels}")
    places, rows = pairs(found)
    scores = found.score(places, rows)
    source = root / f"labels-{num_labels}"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    for place, row, score in list(zip(places, rows, scores, strict=True))[::7]:
        texts = found.data.queries[int(found.query_rows[place])]["text"], found.data.corpus[int(row)]["text"]
        with torch.no_grad():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        expected = logits[0] if num_labels == 1 else logits[1] - logits[0]
        assert score == pytest.approx(float(expected), abs=1e-5)
    assert scores.std() > 0.05, "pairs are told apart"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_number_of_ranks_changes_no_bit(root, num_ranks):
    found = reranker(root)
    places, rows = pairs(found)
    whole, num_queries = found.score(places, rows), len(found.query_rows)
    parts = []
    for rank in range(num_ranks):
        share = share_of(num_queries, rank, num_ranks)
        mine = (places >= share.start) & (places < share.stop)
        parts.append(found.score(places[mine], rows[mine]))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert num_queries > 2 * SHARE_ROWS


def test_other_weights_in_the_same_folder_are_another_cross_encoder(root, tmp_path):
    shutil.copytree(root / "labels-1", tmp_path / "labels-1")
    shutil.copytree(root / "data", tmp_path / "data")
    before = reranker(tmp_path).digest
    assert reranker(tmp_path, max_tokens=64).digest == before == reranker(root).digest
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "labels-1")
    with torch.no_grad():
        model.classifier.bias += 1e-3
    model.save_pretrained(tmp_path / "labels-1")
    assert reranker(tmp_path).digest != before


def test_shares_are_whole_blocks_and_cover_every_row():
    for num_rows in (0, 1, 31, 32, 33, 225, 4096):
        for num_ranks in (1, 2, 3, 7):
            shares = [share_of(num_rows, rank, num_ranks) for rank in range(num_ranks)]
            assert shares[0].start == 0 and shares[-1].stop == num_rows
            for before, after in itertools.pairwise(shares):
                assert before.stop == after.start and (after.start % SHARE_ROWS == 0 or after.start == num_rows)


def test_long_pairs_are_cut(root):
    short, found = (reranker(root, max_tokens=n) for n in (8, 512))
    assert (short.max_tokens, found.max_tokens) == (8, 32), "the model takes no more"
    assert (short.score(*pairs(short)) != found.score(*pairs(found))).any()


@pytest.mark.parametrize(
    "model, sentence",
    [
        ("encoder", "is not a cross-encoder: it has no weights for"),
        ("labels-3", "is not a cross-encoder that scores: it has 3 labels"),
        ("nowhere", "is not a cross-encoder that can be loaded"),
    ],
)
def test_what_is_no_cross_encoder_is_refused_in_a_sentence(root, model, sentence):
    with pytest.raises(InputError, match=sentence) as refused:
        reranker(root, model)
    assert "AutoModelForSequenceClassification" in str(refused.value) and "\n" not in str(refused.value)


def test_a_score_that_is_no_number_names_query_and_passage(root):
    found = reranker(root)
    with torch.no_grad():
        found.model.get_input_embeddings().weight[VOCABULARY.index("socket")] = torch.nan
    shares: list[float] = []
    with pytest.raises(InputError, match=r"scores query 'q\d+' with passage 'd\d+-\d' as nan; set rerank\.model") as refused:
        found.score(*pairs(found), shares.append)
    query = re.search(r"query '(q\d+)'", str(refused.value))[1]
    passage = re.search(r"passage '(\S+)'", str(refused.value))[1]
    texts = [row["text"] for table in (found.data.queries, found.data.corpus) for row in table if row["_id"] in (query, passage)]
    assert len(texts) == 2 and any("socket" in text for text in texts)
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1


def test_filters_keep_what_scores_below_the_positive_and_the_ceiling():
    teacher, positive = torch.tensor([[2.0, 0.4, -1.0, 0.6]]), np.array([1.0], np.float32)
    for settings, expected in [
        (dict(margin=0.5), [False, True, True, False]),
        (dict(max_score=0.0), [False, False, True, False]),
        (dict(), [True, True, True, True]),
    ]:
        kept = Kept(torch.zeros((1, 4), dtype=torch.int64))
        drop_by_cross_encoder(RerankSettings(model="some", **settings), kept, teacher, positive)
        assert kept.mask_QK[0].tolist() == expected


def test_a_filter_without_a_model_is_refused():
    with pytest.raises(InputError, match=r"rerank\.margin=0\.5 needs a cross-encoder; set rerank\.model"):
        RerankSettings(margin=0.5)
