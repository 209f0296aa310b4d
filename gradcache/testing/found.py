"""A loss and its gradients: by the oracle, and by whole steps on ranks that are threads."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradcache.objectives.tile import Objective
from gradcache.options import LossOptions
from gradcache.reference import reference_loss
from gradcache.step import cached_step
from gradcache.sync import NoSync
from gradcache.temperature import Temperature
from gradcache.testing.made_up import MadeUp
from gradcache.testing.threads import ThreadGroup, run_threads

TOLERANCE = 1e-7  # float64 sums in another order; a score of FLOOR among them leaves about 1e-9
TEMPERATURE, PROGRESS = 0.3, 0.3


@dataclass(frozen=True)
class Found:
    """A loss and its gradients, flat, by the name of what they are of; the embeddings' are those of all ranks."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return the loss and the gradients by words for them."""
        return {"the loss": self.loss, **{f"the gradient of {name}": values for name, values in self.gradients.items()}}

    def difference(self, wanted: "Found") -> str | None:
        """Return in words what differs first, and by how much; None if all is equal."""
        others = wanted.named()
        for words, values in self.named().items():
            most = float(others[words].abs().max())
            error = float((values - others[words]).abs().max())
            if not error <= TOLERANCE * max(1.0, most):
                return f"{words} differs by {error:.2g}"
        return None


def temperature() -> Temperature:
    """Return a learnable one, of float64."""
    return Temperature(TEMPERATURE, learnable=True).double()


def leaves_of(made: MadeUp, temperature: Temperature, objective: Objective) -> dict[str, list[Tensor]]:
    """Return what has a gradient, by name."""
    known = objective.named_parameters() if isinstance(objective, nn.Module) else ()
    parameters: dict[str, list[Tensor]] = {
        f"the parameter {name}": [parameter] for name, parameter in known if parameter.requires_grad
    }
    return {"the embeddings": made.embedded, "the temperature": [temperature.log_scale], **parameters}


def oracle_loss(made: MadeUp, options: LossOptions, temperature: Temperature) -> Tensor:
    """Return the loss of all ranks' batches in one graph."""
    return reference_loss(made.embedded, made.batches, loss=options, scale=temperature.scale(), progress=PROGRESS)


def by_oracle(made: MadeUp, options: LossOptions, objective: Objective) -> Found:
    """Return the oracle's. objective: the one that has the parameters."""
    own = temperature()
    leaves = leaves_of(made, own, objective)
    _forget(leaves)
    loss = oracle_loss(made, options, own)
    if loss.requires_grad:
        loss.backward()
    return Found(loss.detach(), _collected(leaves))


def by_steps(made: MadeUp, options: LossOptions) -> list[Found]:
    """Return what each rank finds in a step of all ranks; their objectives are copies."""
    ranks = [(copy.deepcopy(options.objective), temperature()) for _ in made.batches]
    leaves = [leaves_of(made, own, objective) for objective, own in ranks]
    for of_rank in leaves:
        _forget(of_rank)

    def step(group: ThreadGroup | None) -> float:
        rank = 0 if group is None else group.rank()
        objective, own = ranks[rank]
        return cached_step(
            made.batches[rank],
            loss=replace(options, objective=objective),
            temperature=own,
            sync=NoSync(),
            group=group,  # type: ignore[arg-type]  # it has what the loss uses
            chunk_tokens=3,
            keep_graphs=1,
            seed=0,
            step=0,
            progress=PROGRESS,
        ).loss

    losses = [step(None)] if len(ranks) == 1 else run_threads(step, len(ranks))
    return [Found(torch.tensor(loss), _collected(of_rank)) for loss, of_rank in zip(losses, leaves, strict=True)]


def _forget(leaves: dict[str, list[Tensor]]) -> None:
    for tensors in leaves.values():
        for tensor in tensors:
            tensor.grad = None


def _collected(leaves: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    def flat(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor).flatten() if tensor.grad is None else tensor.grad.detach().flatten()

    return {name: torch.cat([flat(tensor) for tensor in tensors]) for name, tensors in leaves.items()}
