"""A version is whole or absent: published by one rename, verified before use, never altered."""

import errno
import json
import os
import shutil
import time

import pytest

from tests.ranks import run_ranks
from tests.trainer.handoff.races import publish_in_lockstep, replace_torn_in_lockstep
from trainer.errors import InputError, MachineFailed
from trainer.handoff import manifest
from trainer.handoff.manifest import (
    TornVersion,
    clean_staging,
    is_pinned,
    open_version,
    pin,
    publish_version,
    read_latest,
    unpin,
    versions,
    write_atomically,
    write_latest,
)
from trainer.handoff.retention import prune


def write_two_files(folder):
    (folder / "a.bin").write_bytes(b"negatives")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("text")


def test_what_is_published_opens_with_its_fields_and_files(tmp_path):
    publish_version(tmp_path / "v1", write_two_files, {"step": 7})
    opened = open_version(tmp_path / "v1")
    assert opened["step"] == 7
    assert sorted(opened["files"]) == ["a.bin", "sub/b.txt"]
    assert opened["files"]["a.bin"]["bytes"] == 9
    assert [p.name for p in tmp_path.iterdir()] == ["v1"], "nothing is left beside the version"


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no manifest", "half a manifest"])
def test_a_damaged_version_is_never_opened(tmp_path, damage):
    publish_version(tmp_path / "v1", write_two_files, {})
    target = tmp_path / "v1" / ("manifest.json" if "manifest" in damage else "a.bin")
    content = target.read_bytes()
    if damage in ("delete", "no manifest"):
        target.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        target.write_bytes(flipped if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(TornVersion, match=r"a\.bin|manifest\.json"):
        open_version(tmp_path / "v1")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "a.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineFailed, match=r"no room left on the disk .*run\.folder"):
        publish_version(tmp_path / "v1", write, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_by_its_words_too(tmp_path):
    def write(folder):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(MachineFailed, match="no room left on the disk"):
        publish_version(tmp_path / "v1", write, {})


def test_a_killed_writer_leaves_only_staging_that_the_next_one_clears(tmp_path):
    child = os.fork()
    if child == 0:
        publish_version(tmp_path / "v1", lambda folder: os.kill(os.getpid(), 9), {})
    os.waitpid(child, 0)
    assert versions(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1, "the staging folder of the killed writer"
    clean_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_version_is_not_replaced_but_a_torn_one_is(tmp_path):
    publish_version(tmp_path / "v1", write_two_files, {"by": "first"})
    assert publish_version(tmp_path / "v1", write_two_files, {"by": "second"})["by"] == "first"
    (tmp_path / "v1" / "a.bin").write_bytes(b"torn")
    publish_version(tmp_path / "v1", write_two_files, {"by": "third"})
    assert open_version(tmp_path / "v1")["by"] == "third"


def test_two_that_publish_one_version_at_once_both_have_the_first(tmp_path):
    """Of 300 versions some fifty lost their second publisher before, to "Directory not empty"."""
    won = run_ranks(publish_in_lockstep, 2, tmp_path, 300)
    assert sum(won) == 300 and len(list(tmp_path.iterdir())) == 300, "nothing is left beside the versions"


def test_two_that_replace_one_torn_version_do_not_lose_each_others(tmp_path):
    assert run_ranks(replace_torn_in_lockstep, 3, tmp_path, 100) == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 100


def test_who_took_a_torn_version_for_what_has_replaced_it_puts_that_back(tmp_path, monkeypatch):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a.bin").write_bytes(b"torn")
    plain = os.rename

    def rename_as_another_replaces_it(source, target):
        if source == tmp_path / "v1" and str(target).endswith("-torn"):
            shutil.rmtree(source)
            plain(tmp_path / "whole", source)
        plain(source, target)

    publish_version(tmp_path / "whole", write_two_files, {"by": "another"})
    monkeypatch.setattr(os, "rename", rename_as_another_replaces_it)
    assert publish_version(tmp_path / "v1", write_two_files, {"by": "this one"})["by"] == "another"
    assert [p.name for p in tmp_path.iterdir()] == ["v1"]


def test_retention_keeps_the_newest_the_pinned_the_needed_and_the_latest(tmp_path):
    for number in range(6):
        publish_version(tmp_path / f"v{number}", write_two_files, {})
    write_latest(tmp_path, "v0")
    pin(tmp_path / "v1", "miner", seconds=60)
    pin(tmp_path / "v2", "miner", seconds=-1)
    deleted = prune(tmp_path, keep=2, needed=lambda folder: folder.name == "v3")
    assert [p.name for p in deleted] == ["v2"]
    assert [p.name for p in versions(tmp_path)] == ["v0", "v1", "v3", "v4", "v5"]
    assert read_latest(tmp_path) == "v0"
    unpin(tmp_path / "v1", "miner")
    assert not is_pinned(tmp_path / "v1")


def test_a_small_file_is_replaced_whole_while_it_is_read(tmp_path):
    path = tmp_path / "status.json"
    write_atomically(path, json.dumps({"n": 0, "pad": "x" * 10_000}))
    child = os.fork()
    if child == 0:
        for n in range(300):
            write_atomically(path, json.dumps({"n": n, "pad": "x" * 10_000}))
        os._exit(0)
    deadline = time.monotonic() + 30
    seen = set()
    while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        seen.add(json.loads(path.read_text())["n"])
    assert len(seen) > 1


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write .*run\.folder"):
        publish_version(tmp_path / "file" / "v1", write_two_files, {})
    assert manifest.versions(tmp_path / "nothing") == []


@pytest.mark.parametrize("hours", [-25, 25])
def test_pins_hold_whatever_the_clocks_of_two_machines_say(tmp_path, monkeypatch, hours):
    publish_version(tmp_path / "v1", write_two_files, {})
    pin(tmp_path / "v1", "elsewhere", seconds=60)
    pin(tmp_path / "v1", "here", seconds=0.01)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    assert is_pinned(tmp_path / "v1")
    unpin(tmp_path / "v1", "elsewhere")
    time.sleep(0.05)
    assert not is_pinned(tmp_path / "v1")


def test_a_version_that_is_pinned_while_it_is_deleted_comes_back(tmp_path, monkeypatch):
    for number in range(2):
        publish_version(tmp_path / f"v{number}", write_two_files, {})
    plain = os.rename

    def rename_as_someone_pins(source, target):
        if source == tmp_path / "v0":
            pin(tmp_path / "v0", "miner", seconds=60)
        plain(source, target)

    monkeypatch.setattr(os, "rename", rename_as_someone_pins)
    assert prune(tmp_path, keep=1) == [] and open_version(tmp_path / "v0")
    unpin(tmp_path / "v0", "miner")
    monkeypatch.undo()
    assert [folder.name for folder in prune(tmp_path, keep=1)] == ["v0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".pins", "v1"]


def test_who_reads_one_folder_of_a_version_verifies_that_one(tmp_path):
    publish_version(tmp_path / "v1", write_two_files, {})
    (tmp_path / "v1" / "a.bin").write_bytes(b"torn")
    assert open_version(tmp_path / "v1", only="sub/")["files"]
    (tmp_path / "v1" / "sub" / "b.txt").write_bytes(b"torn")
    with pytest.raises(TornVersion, match=r"b\.txt"):
        open_version(tmp_path / "v1", only="sub/")
