"""What some ranks have written, any number of ranks reads back."""

import itertools

import pytest
import torch

import trainer.parts
from trainer.handoff.manifest import TornVersion
from trainer.parts import Fragment, Parts, part_name, write_part, writing_share

PART_BYTES = 64 * 2**20


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_others_wrote(tmp_path, writers, readers):
    tensors = {"a": torch.randn(7), "b": torch.randn(3), "c": torch.randn(40)}
    for rank in range(writers):
        whole = [Fragment(name, 0, len(values), values) for name, values in tensors.items()]
        write_part(tmp_path / part_name(rank, writers), [f.share(rank, writers) for f in whole])
    parts = Parts(tmp_path)
    assert sorted(parts.names()) == ["a", "b", "c"]
    for name, values in tensors.items():
        assert parts.numel(name) == len(values)
        for rank in range(readers):
            wanted = Fragment(name, 0, len(values), values).share(rank, readers)
            assert torch.equal(parts.read(name, wanted.start, len(wanted.values)), wanted.values)


def test_a_part_that_is_missing_is_named(tmp_path):
    values = torch.arange(6.0)
    write_part(tmp_path / part_name(0, 2), [Fragment("a", 0, 6, values).share(0, 2)])
    with pytest.raises(TornVersion, match="holds 3 of the 6 elements of a from 0 on"):
        Parts(tmp_path).read("a", 0, 6)
    with pytest.raises(TornVersion, match="holds 0 of the 1 elements of b"):
        Parts(tmp_path).read("b", 0, 1)


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, one entry a time."""
    names, original = [], trainer.parts.safe_open
    monkeypatch.setattr(trainer.parts, "safe_open", lambda path, **how: names.append(path) or original(path, **how))
    return names


def test_a_reader_opens_each_file_once_and_with_an_index_only_what_it_needs(tmp_path, opened):
    tensors = {f"t{number}": torch.randn(64) for number in range(20)}
    for rank in range(32):
        whole = [Fragment(name, 0, len(values), values) for name, values in tensors.items()]
        write_part(tmp_path / part_name(rank, 32), [f.share(rank, 32) for f in whole])
    parts = Parts(tmp_path)
    for name, values in tensors.items():
        assert torch.equal(parts.read(name, 0, 64), values)
    assert len(opened) == 32, "once each"
    opened.clear()
    other = Parts(tmp_path, parts.index)
    for name, values in tensors.items():
        assert torch.equal(other.read(name, 10, 4), values[10:14])
    assert [path.name for path in opened] == [part_name(rank, 32) for rank in (5, 6)]


@pytest.mark.parametrize(
    ("num_copies", "num_bytes", "num_writers"),
    [
        (512, 0, 1),
        (512, PART_BYTES, 1),
        (512, 10 * PART_BYTES + 1, 11),
        (8, 100 * PART_BYTES, 8),
        (1, 10**12, 1),
        (3, 2 * PART_BYTES, 2),
    ],
)
def test_as_many_ranks_write_a_copy_as_there_are_parts_of_some_size(num_copies, num_bytes, num_writers, monkeypatch):
    monkeypatch.setattr("trainer.parts.PART_BYTES", PART_BYTES)
    shares = [writing_share(copy, num_copies, num_bytes) for copy in range(num_copies)]
    written = [share for share in shares if share is not None]
    assert written == [(number, num_writers) for number in range(num_writers)], "everything once"
    places = [copy for copy, share in enumerate(shares) if share is not None]
    assert all(b - a >= num_copies // num_writers for a, b in itertools.pairwise(places)), "spread over the nodes"
