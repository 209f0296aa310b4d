"""The contrastive loss of a batch's pairs, by hand and by packages: each query against the passages, temperature 0.05.

Each is called as its documentation says. Whether a gradient is then that of the mean over the queries of all ranks is a
question that the benchmark answers for each of them, so nothing is put right here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.bench.peer import TEMPERATURE
from trainer.world import World

PairLoss = Callable[[Tensor, Tensor], Tensor]


def by_hand(world: World) -> PairLoss:
    """Return the loss of this rank's queries against the passages of all ranks, gathered with their gradient."""

    def loss(query_BD: Tensor, passage_BD: Tensor) -> Tensor:
        passage_PD = passage_BD if world.group is None else _Gathered.apply(passage_BD, world.group)
        positive_B = world.rank * len(query_BD) + torch.arange(len(query_BD), device=query_BD.device)
        return nn.functional.cross_entropy(query_BD @ passage_PD.T / TEMPERATURE, positive_B)

    return loss


class _Gathered(torch.autograd.Function):
    """All ranks' rows; the backward sums the gradients that all ranks have for this rank's rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole, group=context.group)
        return whole.chunk(dist.get_world_size(context.group))[dist.get_rank(context.group)], None


def info_nce(world: World) -> PairLoss:
    """Return info-nce-pytorch's loss, which knows one process: on several ranks each has its own passages alone."""
    from info_nce import InfoNCE

    return InfoNCE(temperature=TEMPERATURE)


def metric_learning(world: World) -> PairLoss:
    """Return pytorch-metric-learning's NTXentLoss, on several ranks in its DistributedLossWrapper."""
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    own: Any = NTXentLoss(temperature=TEMPERATURE)
    called = own if world.group is None else DistributedLossWrapper(own)

    def loss(query_BD: Tensor, passage_BD: Tensor) -> Tensor:
        labels_B = world.rank * len(query_BD) + torch.arange(len(query_BD), device=query_BD.device)
        # Labels that are one tensor would say that both sides are the same rows.
        return called(query_BD, labels_B, ref_emb=passage_BD, ref_labels=labels_B.clone())

    return loss


def memeff(world: World) -> PairLoss:
    """Return memeff's InfoNCE for embedding models, without its masks; `stable` would scale the gradient by another number."""
    from memeff import DistributedMemoryEfficientQwen3Loss, MemoryEfficientQwen3Loss

    kind = MemoryEfficientQwen3Loss if world.group is None else DistributedMemoryEfficientQwen3Loss
    return kind(temperature=TEMPERATURE, margin=2.0, stable=False, normalized_inputs=True)


def inf_cl(world: World) -> PairLoss:
    """Return Inf-CL's loss; its kernels take widths that 16, 32, 64, 128 or 256 divides."""
    from inf_cl import cal_flash_loss, cal_inf_loss

    def loss(query_BD: Tensor, passage_BD: Tensor) -> Tensor:
        head_dim = next(size for size in (128, 64, 32, 16) if query_BD.shape[1] % size == 0)
        own = cal_flash_loss if world.group is None else cal_inf_loss
        return own(query_BD / TEMPERATURE, passage_BD, head_dim=head_dim).mean()

    return loss
