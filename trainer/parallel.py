"""The encoder under the backend that the launcher chose, and how its gradients are synchronised once a step."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, GradientSync, NoSync
from trainer.world import World


def parallelize(encoder: nn.Module, world: World) -> tuple[nn.Module, GradientSync]:
    """Return the module to call and its synchronisation. Collective: DDP compares the parameters of all ranks."""
    module = world.accelerator.prepare_model(encoder)
    if isinstance(module, DistributedDataParallel):
        return module, DDPSync(module)
    return module, NoSync()
