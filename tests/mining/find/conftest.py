import pytest

from tests.mining.find.world import World


@pytest.fixture(scope="module", params=["float16", "float32"])
def world(request, tmp_path_factory) -> World:
    """Embeddings on disk, of both types that are stored."""
    return World(tmp_path_factory.mktemp("world"), request.param)
