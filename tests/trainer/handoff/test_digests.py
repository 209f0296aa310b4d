"""Sizes and digests of files: whatever block of a file is altered is named, and both kinds of entries are read."""

import hashlib
import json

import numpy as np
import pytest
import xxhash

from trainer.handoff import digests
from trainer.handoff.digests import describe_file, hash_blocks, what_differs
from trainer.handoff.manifest import TornVersion, open_version, publish_version

SIZE, BLOCK = 2500, 1000


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(digests, "READ_BYTES", 300)
    path = tmp_path / "a.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def test_an_entry_holds_the_digest_of_the_whole_or_of_each_block(file):
    data = file.read_bytes()
    assert describe_file(file) == {"bytes": SIZE, "sha256": hashlib.sha256(data).hexdigest()}
    blocks = [xxhash.xxh3_128_hexdigest(data[start : start + BLOCK]) for start in range(0, SIZE, BLOCK)]
    assert describe_file(file, "xxh3_128") == {"bytes": SIZE, "block_bytes": BLOCK, "xxh3_128": blocks}
    assert hash_blocks(file, range(1, 3), BLOCK) == blocks[1:]
    file.write_bytes(b"")
    assert describe_file(file, "xxh3_128")["xxh3_128"] == [] and what_differs(file, describe_file(file, "xxh3_128")) is None


@pytest.mark.parametrize("digest", ["sha256", "xxh3_128"])
def test_a_flipped_byte_is_found_in_any_block(file, digest, monkeypatch):
    entry, data = describe_file(file, digest), file.read_bytes()
    monkeypatch.setattr(digests, "BLOCK_BYTES", 7)  # a reader goes by the size that the manifest names
    assert what_differs(file, entry) is None
    for block, at in enumerate((0, 1000, SIZE - 1)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        said = what_differs(file, entry)
        assert said and ("SHA-256" in said if digest == "sha256" else f"in its block {block} instead" in said)
    file.write_bytes(data[:-1])
    assert what_differs(file, entry) == f"{SIZE - 1} bytes instead of {SIZE}"


@pytest.mark.parametrize("harm", [{"xxh3_128": []}, {"block_bytes": 0}, {"block_bytes": None}, {"xxh3_128": None}])
def test_an_entry_that_cannot_be_is_no_match(file, harm):
    assert what_differs(file, {**describe_file(file, "xxh3_128"), **harm})
    assert what_differs(file, {"bytes": SIZE, "md5": ""}) == "no digest that this version of negpool knows"


def test_versions_of_both_kinds_open_and_a_file_torn_in_either_is_named(tmp_path):
    def write(folder):
        (folder / "a.bin").write_bytes(b"negatives")

    for digest in ("sha256", "xxh3_128"):
        folder = tmp_path / digest
        publish_version(folder, write, {}, digest=digest)
        assert list(open_version(folder)["files"]["a.bin"]) == (
            ["bytes", "sha256"] if digest == "sha256" else ["bytes", "block_bytes", "xxh3_128"]
        )
        assert json.loads((folder / "manifest.json").read_text()) == open_version(folder)
        (folder / "a.bin").write_bytes(b"negativez")
        with pytest.raises(TornVersion, match=r"a\.bin is not what its manifest says: "):
            open_version(folder)
