"""Columns derived from three texts, for the multilinear product of Symile."""

import torch
from torch import Tensor


def symile_rows(embedding_nD: Tensor) -> Tensor:
    """Return queries and passages of triples for the multilinear product of three texts, (3 n / 3, 3 D).

    embedding_nD: n / 3 rows each of three towers, x then y then z. Queries hold x, y and z side by side, the first passages the
    products of the two others, which only their own query may see (`Batch.own_only`), and further passages the same of texts that
    were drawn apart: the negatives. With `outputs` x, y and z of width D each, all three are an anchor once.
    Source: Saporta et al. 2024 (Symile), arXiv 2411.01053.
    """
    x, y, z = embedding_nD.tensor_split(3)
    apart_y, apart_z = y.roll(1, 0), z.roll(2, 0)
    queries = torch.cat([x, y, z], dim=1)
    together = torch.cat([y * z, x * z, x * y], dim=1)
    drawn_apart = torch.cat([apart_y * apart_z, x * apart_z, x * apart_y], dim=1)
    return torch.cat([queries, together, drawn_apart])
