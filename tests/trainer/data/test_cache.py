"""A table is whole or absent, with locks between processes and without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.data import cache as cache_module
from trainer.data.cache import STALE_S, build_once, is_whole, tables_asked_for
from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, open_version

BUILDER = """
import contextlib, sys, time
from pathlib import Path

import numpy as np

from trainer.data import cache

class NoLock:
    def __init__(self, path): pass
    def acquire(self): pass
    def release(self): pass
    __enter__ = acquire
    def __exit__(self, *_): pass

folder, name, num = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def meet(point):  # in lockstep with the others
    (folder.parent / f"{point}-{name}").touch()
    deadline = time.monotonic() + 20
    while len(list(folder.parent.glob(f"{point}-*"))) < num:
        assert time.monotonic() < deadline, "the other one never came"
        time.sleep(0.001)

def build(staging):
    meet("begin")
    np.save(staging / "first.npy", np.full(2000, int(name)))
    meet("between")
    np.save(staging / "second.npy", np.full(2000, int(name)))
    meet("end")

cache.FileLock = NoLock
words = ("a table", build) if "what" in cache.build_once.__annotations__ else (build,)
found = cache.build_once(folder, *words)
read = [np.load(found / f"{part}.npy") for part in ("first", "second")]
meet("read")
print(*sorted({int(value) for part in read for value in part}))
"""


def start(folder, name, num):
    command = [sys.executable, "-c", BUILDER, str(folder), str(name), str(num)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("attempt", range(3))
def test_two_that_build_a_table_without_locks_end_with_one_whole_one(tmp_path, attempt):
    folder = tmp_path / "table"
    processes = [start(folder, name, 2) for name in (1, 2)]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended[0][1] + ended[1][1]
    assert ended[0][0] == ended[1][0] and ended[0][0].strip() in ("1", "2"), "both read the table of one"
    open_version(folder)
    assert not list(tmp_path.glob(".staging-*"))


def write(staging: Path) -> None:
    np.save(staging / "numbers.npy", np.arange(100))


def test_a_killed_builder_leaves_staging_alone_which_another_one_clears_when_it_is_old(tmp_path):
    process = start(tmp_path / "table", 1, 2)
    while not (tmp_path / "between-1").exists():
        (tmp_path / "begin-2").touch()
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.glob(".staging-*")
    assert not (tmp_path / "table").exists()
    build_once(tmp_path / "table", "numbers", write)
    assert left.exists(), "its builder may be alive on another machine"
    old = time.time() - STALE_S - 60
    for path in (left, *left.iterdir()):
        os.utime(path, (old, old))
    build_once(tmp_path / "table", "numbers", write)
    assert left.exists(), "who finds a table looks at nothing else"
    build_once(tmp_path / "another", "numbers", write)
    assert not left.exists()


def test_a_table_that_lacks_a_part_is_made_again(tmp_path):
    folder = build_once(tmp_path / "table", "numbers", write)
    for spoil in (
        lambda: (folder / "numbers.npy").unlink(),
        lambda: (folder / "numbers.npy").write_bytes(b""),
        lambda: (folder / "manifest.json").unlink(),
    ):
        spoil()
        assert not is_whole(folder)
        with tables_asked_for() as tables:
            build_once(folder, "numbers", write)
            build_once(folder, "numbers", lambda staging: pytest.fail("made again"))
        assert [table.made for table in tables] == [True, False]
        assert np.load(folder / "numbers.npy").tolist() == list(range(100))


def test_finding_a_table_hashes_nothing_and_writes_nothing(tmp_path, monkeypatch):
    folder = build_once(tmp_path / "table", "numbers", write)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed"))
    before = sorted(tmp_path.rglob("*"))
    build_once(folder, "numbers", write)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    content = bytearray((folder / "numbers.npy").read_bytes())
    content[-1] ^= 1
    (folder / "numbers.npy").write_bytes(content)
    assert is_whole(folder)
    with pytest.raises(TornVersion, match=r"numbers\.npy is not what its manifest says"):
        open_version(folder)


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_a_folder_without_locks_gets_its_table_all_the_same(tmp_path, monkeypatch, caplog, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(cache_module.FileLock, "acquire", refuse)
    assert json.loads((build_once(tmp_path / "table", "numbers", write) / "manifest.json").read_text())["what"] == "numbers"
    assert "cannot be locked" in caplog.text


def test_a_builder_that_refuses_leaves_nothing(tmp_path):
    def refuse(staging):
        write(staging)
        raise InputError("row 3 is no number")

    with pytest.raises(InputError, match="row 3"):
        build_once(tmp_path / "table", "numbers", refuse)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])
