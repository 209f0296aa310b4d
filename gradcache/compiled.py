"""An objective's statistics with the passes over a tile fused by torch.compile, forward and backward, for GPUs.

Plain torch is the reference; what cannot be compiled runs in it, which is said once. Proven on a CPU; not yet timed on a GPU.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from gradcache.objectives.tile import Objective, Tile

log = logging.getLogger(__name__)
BACKEND = "inductor"
_told_of: set[type] = set()  # objectives that did not compile


def compiled_statistics(objective: Objective, tile: Tile) -> Tensor:
    """Return `objective.statistics(tile)`, (t, S), with its graph; `tile.make_logits` is not used."""
    if type(objective) not in _told_of:
        try:
            # A number in the place of the progress would be compiled in, and each step compiled anew.
            progress = torch.full_like(tile.scale, tile.progress)
            return _compiled(BACKEND)(
                objective,
                tile.scores_tP,
                tile.scale,
                tile.positive_t,
                tile.kind_P,
                dict(tile.row_values),
                tile.second_tP,
                progress,
            )
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            _told_of.add(type(objective))
            first_line = str(error).strip().splitlines()[0]
            log.warning("%s does not compile (%s); it runs in plain torch, slower", type(objective).__name__, first_line)
    return objective.statistics(tile)


@functools.cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_statistics, dynamic=True, backend=backend)


def _statistics(
    objective: Objective,
    scores_tP: Tensor,
    scale: Tensor,
    positive_t: Tensor,
    kind_P: Tensor,
    row_values: dict[str, Tensor],
    second_tP: Tensor | None,
    progress: Tensor,
) -> Tensor:
    return objective.statistics(
        Tile(
            scores_tP=scores_tP,
            scale=scale,
            positive_t=positive_t,
            kind_P=kind_P,
            row_values=row_values,
            second_tP=second_tP,
            progress=progress,  # type: ignore[arg-type]  # a number as a tensor
        )
    )
