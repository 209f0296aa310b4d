"""Arrays that several writers fill, each its own rows, are the files that numpy writes."""

import errno
import os

import numpy as np
import pytest

from trainer.handoff.arrays import ArrayWriter, create_array
from trainer.handoff.negatives import TYPES


def saved(tmp_path, array) -> bytes:
    np.save(tmp_path / "plain.npy", array)
    return (tmp_path / "plain.npy").read_bytes()


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_rows_written_in_any_order_by_two_writers_are_one_array(tmp_path, length, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at, write=os.pwrite: write(handle, data[:100], at))  # as a disk may
    arrays = {name: np.random.default_rng(0).integers(0, 99, length).astype(kind) for name, kind in TYPES.items()}
    for name, array in arrays.items():
        create_array(tmp_path / f"{name}.npy", length, array.dtype)
    for start in (length // 3, 0):
        with ArrayWriter(tmp_path, arrays, is_shared=True) as writer:
            for name, array in arrays.items():
                writer.write(name, start, array[start:] if start else array[: length // 3 or length].astype(np.float64))
    for name, array in arrays.items():
        assert (tmp_path / f"{name}.npy").read_bytes() == saved(tmp_path, array)


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_room_is_taken_at_once_where_a_disk_can(tmp_path, monkeypatch, refusal):
    def refuse(*_):
        raise OSError(refusal, "as a disk says")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if refusal == errno.ENOSPC:
        with pytest.raises(OSError, match="as a disk says"):
            create_array(tmp_path / "ids.npy", 7, np.dtype(np.int64))
    else:
        create_array(tmp_path / "ids.npy", 7, np.dtype(np.int64))
        assert (tmp_path / "ids.npy").read_bytes() == saved(tmp_path, np.zeros(7, np.int64))
