"""The consistency filter keeps what a plain ranking over all scores keeps, and writes a data set that is read again."""

import numpy as np
import pytest

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.data.filter import Consistency, find_consistent, write_filtered
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter")
    write_tiny_dataset(folder / "data", num_queries=240)
    write_tiny_encoder(folder / "encoder")
    return folder


def run_filter(root, seed=0, k=3, pool=60):
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    options = {"k": k, "pool": pool, "seed": seed}
    return data, find_consistent(data, "train", encoder, tokenizer, traits, root / "shards", **options)


def kept_by_plain_ranking(root, data, found, k):
    """Whether each pair stays, by sorting all scores of its query."""
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    tables = [tokenize_side(data, side, tokenizer, traits) for side in ("queries", "corpus")]
    query_QD, passage_ND = (encode_rows(encoder, table, np.arange(len(table.lengths))) for table in tables)
    qrels, texts = data.qrels["train"], list(data.corpus["text"])
    kept = []
    for at in found.places:
        query, passage = int(qrels.query_rows[at]), int(qrels.corpus_rows[at])
        positives = {texts[int(p)] for q, p in zip(qrels.query_rows, qrels.corpus_rows, strict=True) if q == query}
        scores = passage_ND @ query_QD[query]
        better = sum(scores[p] > scores[passage] + 1e-6 for p in found.pool_rows if texts[int(p)] not in positives)
        kept.append(better < k)
    return kept


@pytest.mark.parametrize("k, pool", [(1, 60), (3, 60), (3, 10_000)])
def test_a_pair_stays_if_its_passage_is_among_the_nearest_of_the_pool(root, k, pool):
    data, found = run_filter(root, k=k, pool=pool)
    assert found.is_kept.tolist() == kept_by_plain_ranking(root, data, found, k)
    assert 0 < found.is_kept.sum() < len(found.is_kept) == (data.qrels["train"].scores > 0).sum()


def test_the_pool_follows_from_the_seed(root):
    pools = [run_filter(root, seed=seed)[1].pool_rows.tolist() for seed in (0, 0, 1)]
    assert pools[0] == pools[1] != pools[2] and len(set(pools[0])) == 60


def test_what_is_written_has_the_kept_pairs_and_the_other_splits(root, tmp_path):
    data, found = run_filter(root)
    write_filtered(data, found, tmp_path / "out")
    filtered = open_dataset(tmp_path / "out", tmp_path / "cache")
    before, after = data.qrels["train"], filtered.qrels["train"]
    kept = found.places[found.is_kept]
    assert after.query_rows.tolist() == before.query_rows[kept].tolist()
    assert after.corpus_rows.tolist() == before.corpus_rows[kept].tolist()
    assert after.scores.tolist() == before.scores[kept].tolist()
    assert filtered.corpus["text"] == data.corpus["text"] and filtered.queries["_id"] == data.queries["_id"]
    for split in ("dev", "test"):
        assert filtered.qrels[split].corpus_rows.tolist() == data.qrels[split].corpus_rows.tolist()


def test_judgements_of_a_query_that_lost_its_positives_go_with_them(tmp_path):
    write_tiny_dataset(tmp_path / "data", num_queries=24)
    with open(tmp_path / "data" / "qrels" / "train.tsv", "a") as file:
        file.write("q1\td2-0\t0\nq2\td1-0\t0\n")
    data = open_dataset(tmp_path / "data", tmp_path / "cache")
    places = np.flatnonzero(data.qrels["train"].scores > 0)
    is_kept = data.qrels["train"].query_rows[places] != 1
    write_filtered(data, Consistency("train", places, is_kept, places), tmp_path / "out")
    rows = open_dataset(tmp_path / "out", tmp_path / "cache").qrels["train"]
    assert 1 not in rows.query_rows and (rows.query_rows == 2).sum() == 2


def test_nothing_is_overwritten_and_nothing_empty_is_written(root, tmp_path):
    data, found = run_filter(root)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty; give --out a new folder"):
        write_filtered(data, found, tmp_path)
    nothing = Consistency("train", found.places, np.zeros(len(found.places), bool), found.pool_rows)
    with pytest.raises(InputError, match=r"no pair of .* stays; set --top-k higher"):
        write_filtered(data, nothing, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
