"""The file of clusters is read as it was written, or refused with one sentence."""

import numpy as np
import pytest

from trainer.data.clusters import Clusters, read_clusters, write_clusters
from trainer.errors import InputError


def test_clusters_are_read_as_they_were_written_and_replaced_whole(tmp_path):
    for version in (1, 2):
        write_clusters(tmp_path / "run" / "clusters.npz", Clusters(np.arange(9) % (version + 1), version))
    found = read_clusters(tmp_path / "run" / "clusters.npz", 9)
    assert found.version == 2 and found.of_query.tolist() == [0, 1, 2] * 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["clusters.npz"]


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda path: path.unlink(), r"clusters\.npz holds no clusters \(.*\); expected an \.npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"clusters\.npz holds no clusters"),
        (lambda path: path.write_bytes(b""), r"clusters\.npz holds no clusters"),
        (lambda path: np.savez(path, other=np.arange(9)), r"clusters\.npz holds no clusters \(.*of_query"),
        (lambda path: np.savez(path, of_query=np.ones(9), version=1), r"type float64.*expected a whole number for each"),
        (lambda path: np.savez(path, of_query=np.arange(8), version=1), r"shape \(8,\).*there are 9 training queries"),
        (lambda path: np.savez(path, of_query=np.array([{}] * 9), version=1), r"clusters\.npz holds no clusters"),
    ],
)
def test_a_file_that_is_no_clusters_is_one_sentence(tmp_path, spoil, sentence):
    path = tmp_path / "clusters.npz"
    write_clusters(path, Clusters(np.arange(9), 1))
    spoil(path)
    with pytest.raises(InputError, match=sentence) as error:
        read_clusters(path, 9)
    assert "\n" not in str(error.value)
