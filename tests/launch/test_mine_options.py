"""The options of mining: the same negatives as sentence-transformers' where their meaning is the same, and what is refused."""

import json
import random
import re

import pytest
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

import negpool
from launch.commands import app
from tests.launch.test_mine import keep_signal_handlers  # noqa: F401
from tests.tiny import FILLER, TOPICS, write_tiny_cross_encoder, write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError

NUM_PAIRS = 90
ALL = 2 * NUM_PAIRS  # with margins their range counts other places than ours, so it takes in the whole corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    write_tiny_cross_encoder(folder / "cross-encoder")
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, root):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setattr("launch.mine.start_logging", lambda *_: None)
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def pairs():
    """Pairs of different texts; every third query has two positives."""
    draw, words = random.Random(3), [*TOPICS, *FILLER]
    texts = list({" ".join(draw.sample(words, draw.randint(3, 7))): None for _ in range(3 * NUM_PAIRS)})
    queries, passages = texts[: NUM_PAIRS * 3 // 4], texts[NUM_PAIRS:]
    asked = [query for n, query in enumerate(queries) for _ in range(1 + (n % 3 == 0))]
    return [{"anchor": query, "positive": passages[n]} for n, query in enumerate(asked)]


@pytest.mark.parametrize(
    "same",
    [
        {"num_negatives": 4},
        {"num_negatives": 4, "range_max": 12},
        {"num_negatives": 6, "range_min": 3, "range_max": 9},
        {"num_negatives": 4, "range_max": ALL, "relative_margin": 0.02},
        {"num_negatives": 4, "range_max": ALL, "absolute_margin": 0.01},
        {"num_negatives": 4, "range_max": ALL, "absolute_margin": 0.004, "relative_margin": 0.004},
        {"num_negatives": 3, "range_max": ALL, "max_score": 0.97, "min_score": 0.95},
    ],
    ids=lambda same: ",".join(same),
)
def test_negatives_are_those_of_mine_hard_negatives(root, pairs, same):
    """Both give (anchor, positive, negative): the top of what the same rules leave."""
    peer = SentenceTransformer(str(root / "encoder"), device="cpu")
    theirs = mine_hard_negatives(Dataset.from_list(pairs), peer, output_scores=True, verbose=False, **same)
    how = {"filter.when_empty": "none", "relative_margin": "off"} | same
    ours = negpool.mine_negatives(root / "encoder", pairs, form="triplet", method="top", scores=True, **how).to_dataset()
    wanted, found = ({(r["anchor"], r["positive"], r["negative"]): r["scores"] for r in rows} for rows in (theirs, ours))
    assert found.keys() == wanted.keys() and len(wanted) > NUM_PAIRS
    assert all(found[triplet] == pytest.approx(wanted[triplet], abs=1e-5) for triplet in wanted)


def test_a_range_counts_places_before_scores_drop_any(root, pairs):
    """Where mine_hard_negatives passes over the first of what its margins leave: as docs/mining.md says."""
    how = {"num_negatives": 4, "range_max": ALL, "relative_margin": 0.02, "method": "top", "filter.when_empty": "none"}
    kept = negpool.mine_negatives(root / "encoder", pairs, form="ids", **how)
    later = negpool.mine_negatives(root / "encoder", pairs, form="ids", range_min=10, **how)
    plain = negpool.mine_negatives(root / "encoder", pairs, form="ids", **how | {"relative_margin": "off", "num_negatives": 10})
    for all_of, left, first in zip(kept.rows, later.rows, plain.rows, strict=True):
        assert not set(left["negative_ids"]) & set(first["negative_ids"])
        assert set(all_of["negative_ids"]) <= set(left["negative_ids"]) | set(first["negative_ids"])


def test_each_option_is_its_setting(root, tmp_path, capsys):
    options = ["--num-negatives", 3, "--range-min", 1, "--range-max", 12, "--relative-margin", "off", "--absolute-margin", 0.001]
    options += ["--max-score", 0.99, "--min-score", "-1", "--positive", "best", "--method", "top1"]
    options += ["--cross-encoder", root / "cross-encoder", "--cross-encoder-margin", 0.05]
    settings = ["sample.num_negatives=3", "filter.range_min=1", "filter.range_max=12", "filter.relative_margin=off"]
    settings += ["filter.absolute_margin=0.001", "filter.max_score=0.99", "filter.min_score=-1", "filter.positive=best"]
    settings += ["sample.method=top1", f"rerank.model={root}/cross-encoder", "rerank.margin=0.05"]
    for name, words in (("options", options), ("settings", settings)):
        assert mine_plainly(root, "--out", tmp_path / f"{name}.jsonl", *words) == 0
    assert (tmp_path / "options.jsonl").read_bytes() == (tmp_path / "settings.jsonl").read_bytes()
    assert '"negative_teacher_scores"' in (tmp_path / "options.jsonl").read_text()


def mine_plainly(root, *words):
    return app(["mine", "--model", *map(str, (root / "encoder", "--data", root / "data", *words))], standalone_mode=False)


REFUSED = [
    (["--num-negatives", "3", "sample.num_negatives=4"], "--num-negatives is the setting sample.num_negatives, which is given"),
    (["--query-prefix", "x", "model.query_prefix=y"], "--query-prefix is the setting model.query_prefix, which is given as well"),
    (["data.path=elsewhere"], "--data is the setting data.path, which is given as well; leave one of them out"),
    (["model.name=other"], "model.name has no effect beside --model, which names the model"),
    (["--range-min", "10", "--range-max", "10"], "filter.range_max=10 must be more than filter.range_min=10"),
    (["--range-min", "100"], r"filter.range_min=100 leaves none of search.top_k=64 candidates"),
    (["--num-negatives", "100"], "sample.num_negatives=100 is more than the 64 passages of .*data; set it lower"),
    (["--num-negatives", "9", "--range-min", "2", "--range-max", "10"], "more than the 8 places from filter.range_min=2 to"),
    (["--num-negatives", "0"], "sample.num_negatives=0 cannot be used; expected whole number > 0"),
    (["--relative-margin", "wide"], "filter.relative_margin='wide' cannot be used; expected number >= 0"),
    (["--relative-margin", "-0.1"], "filter.relative_margin=-0.1 cannot be used; expected number >= 0"),
    (["--method", "random"], 'sample.method=\'random\' cannot be used; expected "uniform" | "top"'),
    (["--positive", "worst"], "filter.positive='worst' cannot be used"),
    (["--cross-encoder-margin", "1"], "rerank.margin=1.0 needs a cross-encoder; set rerank.model to one"),
    (["--cross-encoder", "nowhere"], "rerank.model='nowhere' is not a cross-encoder that can be loaded"),
    (["--min-score", "0.5", "--max-score", "0.4"], "filter.min_score=0.5 must be less than filter.max_score=0.4"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_is_one_sentence_and_writes_nothing(root, tmp_path, words, sentence):
    with pytest.raises(InputError, match=sentence):
        mine_plainly(root, "--out", tmp_path / "out.jsonl", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["job.toml", "--num-negatives", "3"], "--num-negatives goes with --model; a run has its settings in its job file, as"),
        (["job.toml", "--out", "a.jsonl", "--method", "top"], "--method goes with --model; .* as sample.method"),
        (
            ["--model", "bm25", "--relative-margin", "0.1"],
            "bm25 gives a positive no score to compare with: --relative-margin has",
        ),
        (["--model", "bm25", "--query-prefix", "x"], "--model bm25 encodes nothing"),
        (["--model", "bm25", "--data", "data", "--out", "a.jsonl", "--scores"], "there are none to write; leave out --scores"),
        (["--num-negatives", "3"], "--num-negatives goes with --model"),
    ],
)
def test_an_option_without_effect_is_refused(root, words, sentence):
    with pytest.raises(InputError, match=sentence):
        app(["mine", *words], standalone_mode=False)
    assert not (root / "a.jsonl").exists()


def test_the_commands_options_are_keywords(root, pairs):
    for settings, sentence in [
        ({"num_negatives": 3, "sample": {"num_negatives": 4}}, "sample.num_negatives is given twice"),
        ({"num_negatives": 3, "sample.num_negatives": 4}, "num_negatives is the setting sample.num_negatives, which is given"),
        ({"top_k": 3}, 'top_k=3 is a setting without its section; write rerank={"top_k": 3} or search={"top_k": 3}'),
        ({"range_min": 9, "range_max": 3}, "filter.range_max=3 must be more than filter.range_min=9"),
    ]:
        with pytest.raises(negpool.InputError, match=sentence):
            negpool.mine_negatives(root / "encoder", pairs, **settings)
    with pytest.raises(negpool.InputError, match="range_min=3 is a setting without its section"):
        negpool.evaluate(root / "encoder", pairs, range_min=3)


def test_a_cross_encoder_in_memory_is_the_one_of_its_folder(root, pairs):
    how = {"num_negatives": 3, "relative_margin": "off", "cross_encoder_margin": 0.1, "form": "ids", "filter.when_empty": "none"}
    peer = CrossEncoder(str(root / "cross-encoder"), device="cpu")
    by_name, by_object = (
        negpool.mine_negatives(root / "encoder", pairs[:30], cross_encoder=model, **how).rows.to_list()
        for model in (root / "cross-encoder", peer)
    )
    assert by_name == by_object and any(row["negative_teacher_scores"] for row in by_name)


def test_a_person_reads_how_many_queries_got_fewer(root, tmp_path, capsys):
    words = ["--num-negatives", 8, "--range-max", 8, "--relative-margin", 0.01, "filter.when_empty=none"]
    assert mine_plainly(root, "--out", tmp_path / "a.jsonl", *words) == 0
    rows = [len(json.loads(line)["negative_ids"]) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    few, out = sum(0 < count < 8 for count in rows), capsys.readouterr().out
    assert few and re.search(rf"queries with fewer negatives +│ +{few} │", out)
    assert "negatives, up to 8 of each query" in out
