"""Whatever the settings and whichever way a negative came in, it breaks no rule: checked one by one, in plain Python.

The first tests draw with matrices of scores, the last one mines with an encoder and looks at its embeddings.
"""

import hashlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.draw import draw_tile
from mining.table.filters import Keys
from mining.table.judgements import read_judgements
from mining.table.kept import KeptTiles
from mining.table.share import Draw
from tests.mining.run import make_job, publish_checkpoint, rows_of
from tests.mining.services import start_service
from tests.mining.table import device
from tests.mining.table.test_draw import JUDGED, NUM_PASSAGES, NUM_QUERIES, POSITIVE, RANKS, TOP_K, Matrix, Words, matrix
from tests.mining.table.whole import draw_negatives, whole
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.handoff.negatives import Negatives, open_negatives

# Some passages have the text of another, some that of a query; queries q and q + 30 are of one text.
PASSAGE_KEYS = np.where(np.arange(NUM_PASSAGES) % 5 == 0, np.arange(NUM_PASSAGES) % 15, np.arange(NUM_PASSAGES))
QUERY_KEYS = np.where(np.arange(NUM_QUERIES) % 4 == 0, PASSAGE_KEYS[np.arange(NUM_QUERIES) % 38], 1000 + np.arange(NUM_QUERIES))
TEXT = np.arange(NUM_QUERIES) % 30
OWN = [set(POSITIVE[text == TEXT].ravel().tolist()) for text in range(30)]
JUDGEMENTS = replace(
    JUDGED,
    text_of_query=TEXT,
    judged_indptr=np.concatenate([[0], np.cumsum([len(own) for own in OWN])]),
    judged_rows=np.concatenate([sorted(own) for own in OWN]),
)
# Positives score higher than most, so that some candidates are below the margins and some above.
SCORES = 0.3 * matrix(0)
np.put_along_axis(SCORES, POSITIVE, np.take_along_axis(SCORES, POSITIVE, 1) + 0.3, 1)
TEACHER = matrix(5)
np.put_along_axis(TEACHER, POSITIVE, np.take_along_axis(TEACHER, POSITIVE, 1) + 1, 1)


def any_settings(seed):
    """Return settings of every kind, at random."""
    random = np.random.default_rng(seed)

    def one(*values):
        return values[random.integers(len(values))]

    filters = FilterSettings(
        positive=one("lowest", "best", "each"),
        when_empty=one("random", "random", "lowest", "none"),
        range_min=one(0, 0, 2),
        range_max=one("off", "off", 6),
        max_score=one("off", "off", 0.5),
        min_score=one("off", "off", -0.3),
        relative_margin=one("off", 0.05, 0.4),
        absolute_margin=one("off", "off", 0.2, -0.1),
        adaptive_margin=one("off", "off", (0.05, 0.2)),
    )
    sample = SampleSettings(
        num_negatives=4,
        method=one("uniform", "top", "top1", "simans", "softmax"),
        random_share=one(0.0, 0.5, 1.0),
        replace=one("all", "easy"),
    )
    has_teacher = one(True, False)
    rules = {"margin": one("off", 0.3), "max_score": one("off", 1.0)} if has_teacher else {}
    return filters, sample, RerankSettings(model="some" if has_teacher else "", top_k=8, **rules)


def draw(settings, version=1, scores=SCORES, last=None, query_tile=4096):
    reranker = Words(TEACHER) if settings[2].model else None
    how = Draw(*settings, 0, version, JUDGEMENTS, (Keys(QUERY_KEYS, PASSAGE_KEYS),), reranker, last, device.DEVICE)
    with tempfile.TemporaryDirectory() as run:
        kept = KeptTiles(Path(run), {})
        return whole(draw_negatives(how, RANKS, Matrix(scores, JUDGEMENTS), kept, lambda *_: None, query_tile))


def below(settings, scores, query, n, positive, teachers):
    """Tell whether a passage keeps all margins to a positive, in the words of the settings; teachers: the cross-encoder's."""
    s, p = scores[query, n], scores[query, positive]
    filters, _, rerank = settings
    keeps = [True]
    if filters.relative_margin != "off":
        keeps.append(s < p - abs(p) * filters.relative_margin + 1e-6)
    if filters.absolute_margin != "off":
        keeps.append(s < p - filters.absolute_margin + 1e-6)
    if filters.adaptive_margin != "off":
        m, k = filters.adaptive_margin
        keeps.append(s < p - (m + k * abs(p)) + 1e-6)
    if rerank.margin != "off":
        keeps.append(TEACHER[query, n] < TEACHER[query, teachers] - rerank.margin + 1e-6)
    return all(keeps)


def broken_rules(settings, scores, query, ids):
    """Return which rules the negatives of a query break."""
    filters, _, rerank = settings
    own_keys = {QUERY_KEYS[query], *PASSAGE_KEYS[list(OWN[TEXT[query]])]}
    best = [max(POSITIVE[query], key=lambda p, table=table: table[query, p]) for table in (scores, TEACHER)]
    broken = ["duplicates"] if len({PASSAGE_KEYS[n] for n in ids}) < len(ids) else []
    for n in ids:
        keeps = [below(settings, scores, query, n, positive, positive) for positive in POSITIVE[query]]
        rules = {
            "judged, or held out": n not in OWN[TEXT[query]] and n != 39,
            "equal texts": PASSAGE_KEYS[n] not in own_keys,
            "max_score": filters.max_score == "off" or scores[query, n] < filters.max_score,
            "min_score": filters.min_score == "off" or scores[query, n] >= filters.min_score,
            "rerank.max_score": rerank.max_score == "off" or TEACHER[query, n] < rerank.max_score,
            "lowest": filters.positive != "lowest" or all(keeps),
            "best": filters.positive != "best" or below(settings, scores, query, n, *best),
            "each": filters.positive != "each" or any(keeps),
        }
        broken += [name for name, is_kept in rules.items() if not is_kept]
    return broken


@pytest.mark.parametrize("seed", range(24))
def test_no_negative_breaks_a_rule(seed):
    settings = any_settings(seed)
    found = draw(settings)
    now = SCORES * np.where(np.random.default_rng(1).random(SCORES.shape) < 0.3, 0.7, 1).astype(np.float32)
    last = Negatives(found.indptr, found.ids, found.scores, 1, {}, first_scores=found.more.get("first_scores"))
    for scores, version in (SCORES, found), (now, draw(settings, 2, now, last if settings[1].replace == "easy" else None)):
        rows = np.split(version.ids, version.indptr[1:-1])
        broken = {query: broken_rules(settings, scores, query, ids) for query, ids in enumerate(rows)}
        assert not any(broken.values()), (settings, {query: names for query, names in broken.items() if names})
        assert all(len(ids) <= 4 for ids in rows)
        counts = version.counts
        if "random" in counts:
            num_wanted = counts["random"] + counts["unfilled"]
            falls_back = settings[0].when_empty == "random"
            assert num_wanted >= settings[1].num_random * NUM_QUERIES
            assert num_wanted <= (4 if falls_back else settings[1].num_random) * NUM_QUERIES
    # How queries are dealt out to tiles changes no number.
    again = draw(settings, query_tile=7)
    for name in ("indptr", "ids", "scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.counts == found.counts


def test_the_negatives_are_what_they_have_always_been():
    digest = hashlib.sha256()
    for seed in range(24):
        found = draw(any_settings(seed))
        digest.update(found.indptr.astype("<i8").tobytes() + found.ids.astype("<i8").tobytes() + found.scores.tobytes())
    # Of the version that had numpy alone; whoever changes it draws other negatives for a job that goes on.
    assert digest.hexdigest() == "e7b4f5ef20dbf1d638e51266b78186cfe14fdd6fc4a104be62fe9afedc76ec2d"


@pytest.mark.parametrize("seed", [0, 1, 6])  # positive = "each"; a cross-encoder, and random passages; "lowest"
def test_a_rank_without_queries_draws_nothing(seed):
    settings, retriever = any_settings(seed), Matrix(SCORES, JUDGEMENTS)
    keys, reranker = (Keys(QUERY_KEYS, PASSAGE_KEYS),), Words(TEACHER) if settings[2].model else None
    how = Draw(*settings, 0, 1, JUDGEMENTS, keys, reranker, device=device.DEVICE)
    part = draw_tile(how, RANKS, retriever, slice(5, 5), lambda *_: None)
    assert len(part.lengths) == 0 == sum(part.counts.values()) and not any(map(len, part.columns.values()))


def test_what_is_too_early_comes_not_in_by_chance_either():
    filters = FilterSettings(range_min=6, relative_margin="off", duplicates=False)
    found = draw((filters, SampleSettings(num_negatives=4, random_share=1.0), RerankSettings()))
    for query, ids in enumerate(np.split(found.ids, found.indptr[1:-1])):
        allowed = [n for n in np.argsort(-SCORES[query], kind="stable") if n != 39][:TOP_K]
        own = {QUERY_KEYS[query], *PASSAGE_KEYS[list(OWN[TEXT[query]])]}
        left = [n for n in allowed if n not in OWN[TEXT[query]] and PASSAGE_KEYS[n] not in own]
        assert not set(left[:6]) & set(ids) and len(ids) == 4


def test_the_rows_that_may_be_drawn_are_looked_for_once(monkeypatch):
    plain, looked, judgements = np.flatnonzero, [], replace(JUDGEMENTS)

    def counting(mask):
        by_miner = sys._getframe(1).f_globals["__name__"].startswith("mining.")
        looked.append(by_miner and np.array_equal(mask, ~judgements.allowed_N))
        return plain(mask)

    settings = FilterSettings(relative_margin=0.4), SampleSettings(num_negatives=4, random_share=0.5), RerankSettings()
    how = Draw(*settings, 0, 1, judgements, (Keys(QUERY_KEYS, PASSAGE_KEYS),))
    monkeypatch.setattr(np, "flatnonzero", counting)
    with tempfile.TemporaryDirectory() as run:
        draw_negatives(how, RANKS, Matrix(SCORES, judgements), KeptTiles(Path(run), {}), lambda *_: None, 4)
    assert sum(looked) == 1, "and not for each tile of 4 queries"


@pytest.mark.parametrize("positive", ["lowest", "each"])
def test_a_service_publishes_nothing_above_a_margin(tmp_path, positive):
    job = make_job(
        tmp_path,
        num_queries=90,
        filter={"relative_margin": 0.01, "max_score": 0.985, "positive": positive},
        sample={"num_negatives": 6, "random_share": 0.34},
        search={"top_k": 20, "bm25_top_k": 10},
    )
    checkpoint = publish_checkpoint(job, 10)
    service = start_service(job)
    assert service.wait() == 0, service.said
    data = open_dataset(tmp_path / "data", tmp_path / "cache")
    judgements, encoder = read_judgements(data, "train"), load_encoder(ModelSettings(name=str(checkpoint / "encoder")))
    with torch.no_grad():
        queries, passages = (
            encoder[0].eval()(dict(encoder[1](texts[:], padding=True, return_tensors="pt"))).double().numpy()
            for texts in (data.queries.select(judgements.query_rows)["text"], data.corpus["text"])
        )
    negatives = open_negatives(tmp_path / "run", "v000001", judgements.num_queries, len(data.corpus), data.digest)
    counts = negatives.manifest["counts"]
    assert counts["queries_without"] > 5 and counts["redrawn"] > 5 and counts["random"] > 20, counts
    num_empty = 0
    for place, ids in enumerate(rows_of(job, "v000001")):
        of_positives = (passages[judgements.positives(slice(place, place + 1))[1]] @ queries[place]) * 0.99
        ceiling = of_positives.min() if positive == "lowest" else of_positives.max()
        scores = passages[ids] @ queries[place]
        assert (scores < min(ceiling, 0.985) + 1e-5).all(), place
        num_empty += 6 - len(ids)
    assert num_empty >= counts["unfilled"]
    assert (negatives.margins is None) == (positive == "lowest")
