"""What some ranks have written, any number of ranks reads back."""

import pytest
import torch

from trainer.handoff.manifest import TornVersion
from trainer.parts import Fragment, Parts, part_name, write_part


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
