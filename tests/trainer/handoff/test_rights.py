"""What is published may be read by whom the umask lets read it, and what may not be read is said to be there.

Root reads everything, so the reader becomes a user without rights for a while; that only root can do.
"""

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from launch.__main__ import main
from launch.commands import app
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.encoder.shards import Shards
from trainer.errors import EXIT_REFUSED, InputError
from trainer.handoff.manifest import NotReadable, open_version, publish_version, remove_torn, write_latest
from trainer.handoff.rights import unreadable

NOBODY = 65534


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], indirect=True, ids=oct)
def test_what_is_published_has_the_rights_that_the_umask_leaves(tmp_path, umask):
    def write(folder):
        (folder / "sub").mkdir(mode=0o700)
        safetensors.torch.save_file({"a": torch.zeros(2)}, folder / "sub" / "weights.safetensors")
        (folder / "text").write_text("text")
        os.chmod(folder / "text", 0o600)

    publish_version(tmp_path / "v1", write, {})
    for path in ((tmp_path / "v1"), *(tmp_path / "v1").rglob("*")):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_folder_for_a_group_stays_one(tmp_path):
    tmp_path.chmod(0o2775)
    publish_version(tmp_path / "v1", lambda folder: (folder / "sub").mkdir(mode=0o700), {})
    assert mode(tmp_path / "v1" / "sub") == mode(tmp_path / "v1") and mode(tmp_path / "v1") & stat.S_ISGID


@pytest.fixture(scope="module")
def root():
    """A folder that anybody may enter; pytest shuts its own again and again."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def run(root):
    """A run with one checkpoint, a model and a data set that anybody may read."""
    write_tiny_dataset(root / "data")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(write_tiny_encoder(root / "model"))))
    (root / "model" / "model.safetensors").chmod(0o644)

    def write(folder):
        (folder / "encoder").mkdir()
        save_encoder(folder / "encoder", encoder, tokenizer, traits)

    checkpoints = root / "run" / "checkpoints"
    publish_version(checkpoints / "step-00000001", write, {"step": 1})
    write_latest(checkpoints, "step-00000001")
    (root / "run" / "job.toml").write_text("")
    Shards(root / "run" / "shards" / "kept", 1, 1).publish(0, torch.zeros(1, 2).numpy())
    # Every module is imported now: a stranger may not even read Python's own.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(root / "cache"))
        for words in (["eval", root / "model", root / "data"], ["data", "check", root / "data"], ["status", root / "run"]):
            app([*map(str, words)], standalone_mode=False)
    return root / "run"


@pytest.fixture
def shut():
    """Take the rights of all others from a file or folder, for the length of a test."""
    taken = []

    def take(path):
        taken.append((path, mode(path)))
        path.chmod(mode(path) & 0o700)
        return path

    yield take
    for path, before in taken:
        path.chmod(before)


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextlib.contextmanager
def as_a_stranger():
    """Be a user without rights, as far as files go."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@only_root
def test_a_sentence_names_what_may_not_be_read_and_who_may_change_that(run, shut):
    weights = run / "checkpoints" / "step-00000001" / "encoder" / "model.safetensors"
    with as_a_stranger():
        assert unreadable(weights) is None and unreadable(run) is None and unreadable(run / "nothing") is None
    shut(weights)
    with as_a_stranger():
        wanted = f"{weights} cannot be read: permission denied; ask its owner, root, for the right to read it (chmod -R a+rX "
        assert unreadable(weights) == f"{wanted}{weights})"
    shut(run)
    with as_a_stranger():
        assert unreadable(run).startswith(f"{run} cannot be read: permission denied; ask its owner")
        assert unreadable(weights).startswith(f"{run} cannot"), "what lies in it cannot even be looked for"
        assert unreadable(run / "nothing").startswith(f"{run} cannot")
    assert unreadable(weights) is None, "root may"


@only_root
def test_a_version_that_may_not_be_read_is_not_torn(run, shut):
    checkpoint = run / "checkpoints" / "step-00000001"
    shut(checkpoint / "encoder" / "config.json")
    with as_a_stranger(), pytest.raises(NotReadable, match=r"config\.json cannot be read: permission denied; ask its owner"):
        open_version(checkpoint)
    with as_a_stranger(), pytest.raises(InputError, match="cannot be read"):
        remove_torn(checkpoint)
    shut(checkpoint)
    with as_a_stranger(), pytest.raises(NotReadable, match="step-00000001 cannot be read"):
        open_version(checkpoint)
    assert open_version(checkpoint)["step"] == 1


@pytest.fixture
def strangers_cache(root, tmp_path, monkeypatch):
    cache = root / tmp_path.name
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)
    return cache / "negpool"


def say(monkeypatch, capfd, *words):
    """Return a command's code and its last line to people."""
    monkeypatch.setattr(sys, "argv", ["negpool", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capfd.readouterr().err.strip().split("\n")[-1]


@only_root
@pytest.mark.parametrize(
    "shuts",
    ["run", "run/checkpoints", "run/checkpoints/step-00000001", "run/checkpoints/step-00000001/encoder/model.safetensors"],
)
def test_a_run_that_may_not_be_read_is_not_said_to_be_without_checkpoint(run, shut, shuts, monkeypatch, capfd, strangers_cache):
    place = shut(run.parent / shuts)
    for model in (run, run / "checkpoints" / "step-00000001"):
        with as_a_stranger():
            code, said = say(monkeypatch, capfd, "eval", model, run.parent / "data")
        assert code == EXIT_REFUSED and said.startswith(f"negpool: {place} cannot be read: permission denied; ask its owner"), (
            said
        )


@only_root
@pytest.mark.parametrize(
    "shuts, words",
    [
        ("model", ["eval", "{root}/model", "{root}/data"]),
        ("model/model.safetensors", ["eval", "{root}/model", "{root}/data"]),
        ("model/config.json", ["eval", "{root}/model", "{root}/data"]),
        ("data", ["data", "check", "{root}/data"]),
        ("data/qrels", ["data", "check", "{root}/data"]),
        ("data/corpus.jsonl", ["data", "check", "{root}/data"]),
        ("data/corpus.jsonl", ["encode", "{root}/model", "{root}/data/corpus.jsonl", "--out", "x.npy"]),
        ("run", ["status", "{root}/run"]),
        ("run/job.toml", ["status", "{root}/run"]),
    ],
)
def test_what_may_not_be_read_is_said_to_be_there(run, shut, shuts, words, monkeypatch, capfd, strangers_cache):
    place = shut(run.parent / shuts)
    with as_a_stranger():
        code, said = say(monkeypatch, capfd, *(word.format(root=run.parent) for word in words))
    assert code == EXIT_REFUSED and said.startswith(f"negpool: {place} cannot be read: permission denied"), said


@only_root
def test_a_run_that_may_be_read_and_not_written_is_evaluated(run, strangers_cache):
    with as_a_stranger():
        assert app(["eval", str(run), str(run.parent / "data")], standalone_mode=False) == 0
    assert list((strangers_cache / "shards").iterdir()), "embeddings are kept where they may be"
