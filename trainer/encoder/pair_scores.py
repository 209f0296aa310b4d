"""The scores of single pairs of query and passage, each summed in one fixed order.

A matrix product may sum in another order when it stands in another tile. Here the last bit of a score is a function of the two
embeddings alone, whatever other pairs are scored beside it.
"""

import numpy as np
import torch
from torch import Tensor

PAIRS_BYTES = 64 << 20  # of embeddings that are gathered at once


def score_pairs(query_QD: Tensor, passage_ND: Tensor, query_n: Tensor, passage_n: Tensor) -> Tensor:
    """Return the inner product of each pair, (n,) float32, on the device of the embeddings.

    query_QD, passage_ND: float16 or float32, on one device. query_n, passage_n: (n,) int64 rows of each, there too.
    """
    queries, passages = query_QD.numpy(), passage_ND.numpy()
    scores = np.empty(len(query_n), np.float32)
    step = max(1, PAIRS_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(scores), step):
        pairs = slice(start, start + step)
        left, right = queries[query_n[pairs].numpy()], passages[passage_n[pairs].numpy()]
        scores[pairs] = np.multiply(left, right, dtype=np.float32).sum(1)
    return torch.from_numpy(scores)
