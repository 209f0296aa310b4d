"""What an index of lists does on a GPU: choose the lists of passages as they come, train, and search.

The lists are filled in the host's memory and copied once. Where FAISS has no such index on a GPU, or the GPU has no room for it,
the search stays on the CPU, and that is said.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mining.find.index import num_gpus_of

log = logging.getLogger(__name__)

GPU_MOST = 2048  # FAISS's limit for neighbours and for lists of a query
SMALL_TABLES = 48  # codes of a passage up to which a query's float32 tables fit into a block's shared memory


def nearest_lists(
    faiss: Any, ivf: Any, index: Any, vectors: Tensor | np.ndarray, row_n: np.ndarray, batch: int
) -> np.ndarray | None:
    """Return the list of each of some rows of a shard that is on a GPU, (n,) int64, or None where the CPU has to choose.

    In batches of one shape, the last one filled up: a product's last bits depend on nothing else there.
    """
    quantizer = faiss.downcast_index(ivf.quantizer)
    is_plain = isinstance(quantizer, faiss.IndexFlat) and not isinstance(index, faiss.IndexPreTransform)
    if not isinstance(vectors, Tensor) or not vectors.is_cuda or not is_plain:
        return None
    centroid_LD = torch.from_numpy(quantizer.reconstruct_n(0, quantizer.ntotal)).to(vectors.device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return nearest_by_product(vectors[torch.from_numpy(row_n).to(vectors.device)], centroid_LD, batch).cpu().numpy()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def nearest_by_product(passage_nD: Tensor, centroid_LD: Tensor, batch: int) -> Tensor:
    """Return which centroid has the largest product with each passage, (n,) int64."""
    filled_nD = torch.nn.functional.pad(passage_nD.float(), (0, 0, 0, -len(passage_nD) % batch))
    return torch.cat([(part_BD @ centroid_LD.T).argmax(1) for part_BD in filled_nD.split(batch)])[: len(passage_nD)]


def gpu_copy(faiss: Any, ivf: Any, device: torch.device) -> tuple[Any, Any] | None:
    """Return (index of lists on a GPU, what has to live as long), or None, and why, in the log."""
    if not num_gpus_of(faiss):
        log.info("this FAISS sees no GPU: the index is searched on the CPU")
        return None
    options = faiss.GpuClonerOptions()
    # Tables of a query's products with codebooks, in shared memory; of lists of whole embeddings FAISS keeps float32.
    options.useFloat16 = hasattr(ivf, "pq") and ivf.pq.M > SMALL_TABLES
    options.usePrecomputed = False  # of use for distances only
    resources = faiss.StandardGpuResources()
    try:
        found = faiss.index_cpu_to_gpu(resources, _gpu_number(faiss, device), ivf, options)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        log.warning("the GPU does not take this index (%s): it is searched on the CPU; index.factory decides what it is", said)
        return None
    return found, resources


def train_on_gpu(faiss: Any, ivf: Any, device: torch.device) -> object:
    """Have the centroids of an index of lists trained on a GPU, if FAISS sees one; return what has to live until then."""
    if ivf is None or device.type != "cuda" or not num_gpus_of(faiss):
        return None
    resources = faiss.StandardGpuResources()
    flat = faiss.index_cpu_to_gpu(resources, _gpu_number(faiss, device), faiss.IndexFlatIP(ivf.d))
    ivf.clustering_index = flat
    return resources, flat


def _gpu_number(faiss: Any, device: torch.device) -> int:
    return (device.index or 0) % faiss.get_num_gpus()
