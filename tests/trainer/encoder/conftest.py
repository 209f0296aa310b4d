"""Random transformers, each written once for all tests of the encoder."""

import functools

import pytest

from tests.trainer.encoder.families import write_family


@pytest.fixture(scope="session")
def transformer(tmp_path_factory):
    """Return a function that gives the folder of a random transformer of a family."""
    root = tmp_path_factory.mktemp("transformers")
    return functools.cache(lambda family="bert", seed=0: write_family(root / f"{family}-{seed}", family, seed))
