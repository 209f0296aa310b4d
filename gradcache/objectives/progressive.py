"""InfoNCE that begins with the easy rows and ends with the hard ones, by the training's progress.

The idea is that of Wu et al. 2023 (PEG), arXiv 2311.11691, whose weights of rows grow or fall with the progress and the row's
difficulty; these weights are the simplest that do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.tile import Rows


@dataclass(kw_only=True, eq=False)
class Progressive(InfoNCE):
    """InfoNCE under weights of rows: twice the positive's probability at first, twice the rest to 1 at last; without gradient."""

    def loss(self, rows: Rows) -> Tensor:
        """Return each row's loss under its weight, (t,)."""
        loss_t = super().loss(rows)
        difficulty_t = 1 - torch.exp(-loss_t.detach())  # 1 - the probability of the positive
        return 2 * loss_t * ((1 - rows.progress) * (1 - difficulty_t) + rows.progress * difficulty_t)
