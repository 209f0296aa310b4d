"""Whatever cannot be used is one sentence and exit code 2, never a traceback: the command line, in this process."""

import shutil
import sys

import numpy as np
import pytest

from launch.__main__ import main
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import EXIT_REFUSED

JOB = '[run]\nfolder = "{root}/run"\n[data]\npath = "{root}/data"\ncache = "{root}/cache"\n[model]\nname = "{root}/model"\n'
BROKEN = {  # file of a model -> what it holds
    "config.json": [
        "{nope",
        "[1]",
        b"\xff\xfe{",
        '{"model_type": "nosuchtype"}',
        '{"model_type": "bert", "hidden_size": "wide"}',
    ],
    "tokenizer.json": ["{", "[]"],
    "model.safetensors": ["nope", b"\x10"],
    "negpool.json": ["{", "[1]", '{"pooling": 5}', '{"max_query_tokens": "many"}'],
    "modules.json": ["{", '{"a": 1}', '["a"]', '[{"x": 1}]'],
    "sentence_bert_config.json": ["[]", '{"max_seq_length": "many"}'],
    "config_sentence_transformers.json": ["nope", '{"prompts": 3}', '{"prompts": {"query": 5}}'],
    "router_config.json": ["{", '{"a": 1}'],
    "1_Pooling/config.json": ["{", "[]"],
}
NOWHERE = [
    "/no-such/folder",
    "./nope",
    "../nope",
    "~/nope",
    "a/b/c",
    "nope/",
    "two words",
    "",
    "x" * 300,
    "org/offline",
    "{root}/afile",
]
NOWHERE += ["{root}/empty", "{root}/dangling", "{root}/circle", "/dev/null"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "model")
    (folder / "empty").mkdir()
    (folder / "afile").write_text("x")
    (folder / "dangling").symlink_to(folder / "gone")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "job.toml").write_text(JOB.format(root=folder))
    return folder


@pytest.fixture
def refuse(root, monkeypatch, capfd):
    monkeypatch.chdir(root)

    def call(*words: str) -> str:
        """Return the sentence with which a command refuses."""
        monkeypatch.setattr(sys, "argv", ["negpool", *(word.format(root=root) for word in words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr().err
        assert ended.value.code == EXIT_REFUSED and "Traceback" not in said, (words, said)
        return said

    return call


@pytest.mark.parametrize("name", NOWHERE)
def test_a_name_that_leads_to_no_model(refuse, name):
    named = [["eval", name, "data"], ["search", name, "data", "words"], ["encode", name, "data", "--out", "x.npy"]]
    for words in [*named, ["merge", "out", name, "model"]]:
        assert "negpool: " in refuse(*words)
    refuse("data", "filter", "data", "--model", name, "--out", "out")
    if name:  # of a job: the model's folder as a job names it
        refuse("train", "job.toml", f'model.name="{name}"')


@pytest.mark.parametrize(("file", "content"), [(file, content) for file, contents in BROKEN.items() for content in contents])
def test_a_model_with_a_broken_file(refuse, root, tmp_path, file, content):
    model = shutil.copytree(root / "model", tmp_path / "model")
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(model) in refuse("eval", str(model), "data")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_without_a_file(refuse, root, tmp_path, name):
    model = shutil.copytree(root / "model", tmp_path / "model")
    (model / name).unlink()
    assert str(model) in refuse("eval", str(model), "data")


@pytest.mark.parametrize("manifest", ["{", '{"files": {}}', '{"files": {"a": 3}}', '{"files": 5}'])
def test_a_checkpoint_with_a_broken_manifest(refuse, tmp_path, manifest):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "manifest.json").write_text(manifest)
    assert "is not whole" in refuse("eval", str(tmp_path), "data")


@pytest.mark.parametrize("name", [*NOWHERE[:8], "{root}/empty", "{root}/afile", "{root}/dangling", "{root}/circle", "x" * 300])
def test_a_name_that_leads_to_no_data(refuse, root, tmp_path, monkeypatch, name):
    if name == "":  # this folder
        monkeypatch.chdir(tmp_path)
    refuse("data", "check", name)
    refuse("eval", "bm25", name)


JOBS = [
    b"\xff\xfe\x00",
    b"[run\n",
    b"[run]\nseed=1\n[run]\nseed=2\n",
    b"[run]\nfolder=2020-01-01\n",
    b"[[run]]\nseed=1\n",
    b"x = 1\n",
]
JOBS += [b"[optim]\nlr=nan\n", b"[run]\nseed=99999999999999999999999\n", b"", b"[nope]\n", b'[run]\nfolder="a\\u0000b"\n']


@pytest.mark.parametrize("content", JOBS)
def test_a_job_that_is_none(refuse, tmp_path, content):
    (tmp_path / "job.toml").write_bytes(content)
    for command in ("train", "run"):
        refuse(command, str(tmp_path / "job.toml"))


@pytest.mark.parametrize("name", ["/no-such.toml", "{root}/empty", "{root}/dangling", "{root}/circle", "/dev/null", "x" * 300])
def test_a_job_file_that_is_no_file(refuse, name):
    for command in ("train", "run", "check"):
        refuse(command, name)


@pytest.mark.parametrize(
    "override",
    [
        "run.folder={root}/afile",
        "run.folder={root}/afile/x",
        "run.folder=/proc/x",
        "run.folder={root}/dangling",
        f"run.folder={'x' * 300}",
        "data.cache={root}/afile",
        "data.path={root}/afile",
        "model.name={root}/empty",
        "run.seed",
        "=5",
        "a=1",
        'run.folder="a\\u0000b"',
    ],
)
def test_a_setting_that_cannot_be_used(refuse, override):
    refuse("train", "{root}/job.toml", "batch.queries=4", override)


@pytest.mark.parametrize(
    "files",
    [
        {"job.toml": b"\xff\xfe"},
        {"job.toml": b"x = 1\n"},
        {"job.toml": b"", "results.json": b"{"},
        {"job.toml": b"", "results.json": b'{"bm25": 3}'},
        {"job.toml": b"", "logs/metrics.jsonl": b'nope\n[1]\n{"step": "x"}\n'},
        {"job.toml": b"", "status/miner.json": b'{"phase": 5, "dropped": [1]}'},
        {},
    ],
)
def test_a_folder_that_is_no_run(refuse, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    refuse("report", str(tmp_path))
    if any(name in files for name in ("results.json", "status/miner.json")) or not files:
        refuse("status", str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "{root}/afile", "model", "model"],
        ["merge", "/proc/x", "model", "model"],
        ["merge", "out", "model", "model", "--weights", "nan,1"],
        ["merge", "out", "model", "model", "--weights", "a"],
        ["data", "filter", "data", "--model", "model", "--out", "{root}/afile"],
        ["data", "filter", "data", "--model", "model", "--out", "{root}/afile/x"],
        ["data", "filter", "data", "--model", "model", "--out", "/proc/x"],
        ["data", "code", "--out", "{root}/afile"],
        ["data", "code", "--out", "out", "--source", "/no-such"],
        ["mine", "--model", "bm25", "--data", "data", "--out", "{root}/afile/x.jsonl"],
        ["mine", "--model", "bm25", "--data", "data", "--out", "{root}/x.txt"],
        ["eval", "model", "data", "--split", "nope"],
        ["search", "model", "data", " "],
        ["nope"],
    ],
)
def test_a_place_or_an_option_that_cannot_be_used(refuse, words):
    refuse(*words)


def test_vectors_that_are_none(refuse, tmp_path):
    for queries in (b"nope", None):
        np.save(tmp_path / "passages.npy", np.zeros((2, 4)))
        np.save(tmp_path / "queries.npy", np.array([{"a": 1}], dtype=object))
        if queries is not None:
            (tmp_path / "queries.npy").write_bytes(queries)
        refuse("mine", "--model", str(tmp_path), "--data", "data", "--out", "out.jsonl")
