"""What a factory string stands for: a FAISS index by its name, what it takes, and whether it is one at all.

FAISS is an extra of the installation; exact search, the default, does not need it. What stands last in a string and only
refines (`RFlat`) is left out: whatever an approximate index finds is scored anew from the embeddings themselves.
"""

import math
import re
from typing import Any

from mining.settings import EXACT
from trainer.errors import InputError

POINTS_PER_LIST = 64  # passages that the centroid of a list is trained from, at most
CODES = 256  # of a quantiser with 8 bits; ranges of numbers and rotations ask for as many passages
SCORES_ARE_EXACT = re.compile(r"IVF\d+[kM]?(_HNSW\d+)?,Flat")  # lists hold the embeddings as they are
UNTRAINED = re.compile(r"HNSW\d+(,Flat)?|NSG\d+(,Flat)?")
REFINES = re.compile(r",(RFlat|Refine\(.*\))$")


def is_exact(factory: str) -> bool:
    """Tell whether a factory string stands for exact search, which needs no FAISS: FAISS's "Flat" is nothing else."""
    return factory in (EXACT, "Flat")


def load_faiss(factory: str) -> Any:
    """Return FAISS for an index that is not exact search; raises InputError where it is not installed."""
    try:
        import faiss  # here: exact search does without it, and it brings an OpenMP of its own
    except ImportError as error:
        raise InputError(
            f"index.factory={factory!r} needs FAISS, which cannot be imported ({error}); run pip install 'negpool[faiss]', "
            "or 'negpool[faiss-gpu]' for one that uses CUDA, or set index.factory to \"exact\""
        ) from error
    return faiss


def empty_index(factory: str, width: int) -> Any:
    """Return an index with nothing in it, which is still to be trained; raises InputError."""
    faiss = load_faiss(factory)
    try:
        faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        index = faiss.index_factory(width, REFINES.sub("", factory), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"index.factory={factory!r} is not a FAISS index for {width} dimensions; "
            'expected "exact", "auto" or a factory string such as "IVF1024,Flat" or "IVF1024,SQ8"'
        ) from error
    if (ivf := ivf_of(faiss, index)) is not None:
        ivf.cp.min_points_per_centroid = 1  # few are meant where few are asked for
        ivf.cp.max_points_per_centroid = POINTS_PER_LIST
    for part in (ivf, _inner(faiss, index)):
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds for each part of a vector, for a kind of search that is not ours
    return index


def ivf_of(faiss: Any, index: Any) -> Any:
    """Return the index of lists that an index is or holds behind transformations of its vectors, or None."""
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


def num_lists(factory: str) -> int:
    """Return how many lists a factory string names; 0: it has none."""
    found = re.search(r"IVF(\d+)([kM]?)", factory)
    return 0 if found is None else int(found[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found[2]]


def num_trained(factory: str, num_passages: int) -> int:
    """Return how many passages an index is trained from: 64 a list at most, or all where there are fewer; 0: none is needed."""
    if is_exact(factory) or UNTRAINED.fullmatch(factory):
        return 0
    return min(num_passages, POINTS_PER_LIST * max(CODES, num_lists(factory)))


def least_trained(faiss: Any, index: Any) -> int:
    """Return how many passages training needs at least: one for each centroid of the largest quantiser, for each dimension of a
    rotation.
    """
    ivf, inner = ivf_of(faiss, index), _inner(faiss, index)
    has_rotation = isinstance(index, faiss.IndexPreTransform) and not index.is_trained
    codes = [1 << part.pq.nbits for part in (ivf, inner) if hasattr(part, "pq")]
    return max(1, *codes, 0 if ivf is None else ivf.nlist, index.d if has_rotation else 0)


def num_gpus_of(faiss: Any) -> int:
    """Return how many GPUs a FAISS sees."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def bytes_of_passage(factory: str, width: int) -> int:
    """Return how many bytes a passage takes in an index; 0: exact search, which maps files. Raises InputError."""
    if is_exact(factory):
        return 0
    faiss, index = load_faiss(factory), empty_index(factory, width)
    inner = _inner(faiss, index)
    links = 5 * inner.hnsw.nb_neighbors(0) if hasattr(inner, "hnsw") else 0  # 4 bytes each, and those of higher levels
    holder = faiss.downcast_index(inner.storage) if links else index
    room = 1.25 if hasattr(inner, "nlist") else 1  # lists grow by doubling
    return math.ceil(room * (holder.sa_code_size() + links + 8)) + 2  # its id; whether it is an entry, and is allowed


def _inner(faiss: Any, index: Any) -> Any:
    """Return the index behind a transformation of its vectors, if there is one."""
    return faiss.downcast_index(index.index) if hasattr(index, "index") else index
