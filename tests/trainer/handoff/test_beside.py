"""What a person asked for is there whole, or nothing is."""

import errno
import os

import pytest

from trainer.errors import InputError
from trainer.handoff.beside import made_whole


def test_a_file_and_a_folder_are_whole_or_absent(tmp_path):
    with made_whole(tmp_path / "new/file.txt") as beside:
        beside.write_text("all")
        assert not (tmp_path / "new/file.txt").exists() and beside.suffix == ".txt"
    with made_whole(tmp_path / "folder") as beside:
        (beside / "below").mkdir(parents=True)
        (beside / "below/file").write_text("all")
    for out in ("one", "new/file.txt"):
        with pytest.raises(ZeroDivisionError), made_whole(tmp_path / out) as beside:
            beside.write_text("half")
            _ = 1 / 0
    assert (tmp_path / "new/file.txt").read_text() == (tmp_path / "folder/below/file").read_text() == "all"
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "file.txt", "folder", "below", "file"}


def test_what_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path):
    for number, sentence in [(errno.ENOSPC, "no room is left on the disk"), (errno.EACCES, "Permission denied")]:
        with pytest.raises(InputError, match=f"{sentence}; choose another place"), made_whole(tmp_path / "out") as beside:
            beside.mkdir()
            (beside / "half").write_text("")
            raise OSError(number, os.strerror(number))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), made_whole(tmp_path / "file/below") as beside:
        raise AssertionError("nothing is written where there is no place")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")
    with pytest.raises(InputError, match="cannot write"), made_whole(tmp_path / "full") as beside:
        beside.mkdir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "precious"]
