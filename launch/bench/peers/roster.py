"""Who takes part in `negpool bench peers`, and who is left out and why: never silently."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.bench.peers.contender import Contender, Scene
from launch.bench.peers.grad_cache import ON_PYPI, GradCacheStep, grad_cache, installed_folder
from launch.bench.peers.ours import OurModel, OurStep
from launch.bench.peers.pair_losses import PairLoss, by_hand, inf_cl, info_nce, memeff, metric_learning
from launch.bench.peers.plain_loop import PlainLoop, PlainModel
from launch.bench.peers.sbert import sbert_steps
from trainer.world import World

OURS, BY_HAND = "ours", "plain torch loop"


@dataclass(frozen=True)
class LossPackage:
    """A package whose loss a plain loop can have."""

    name: str
    module: str
    install: str
    loss: Callable[[World], PairLoss]
    needs_gpu: bool = False


PACKAGES = [
    LossPackage("info-nce-pytorch", "info_nce", "pip install 'negpool[bench]'", info_nce),
    LossPackage("pytorch-metric-learning", "pytorch_metric_learning", "pip install 'negpool[bench]'", metric_learning),
    LossPackage("memeff", "memeff", "pip install memeff", memeff, needs_gpu=True),
    LossPackage("inf-cl", "inf_cl", "pip install inf-cl", inf_cl, needs_gpu=True),
]


def left_out(has_gpu: bool) -> dict[str, str]:
    """Return who does not take part on this machine, each with the reason and what to do about it."""
    found = {}
    if not is_installed("sentence_transformers"):
        found["sentence-transformers"] = "not installed; run: pip install 'negpool[bench]'"
    try:
        grad_cache()
    except ImportError:
        found["GradCache"] = f"not installed; run: pip install --no-deps --target {installed_folder()} {ON_PYPI}"
    for package in PACKAGES:
        if package.needs_gpu and not has_gpu:
            found[package.name] = f"needs an NVIDIA GPU; there: {package.install}"
        elif not is_installed(package.module):
            found[package.name] = f"not installed; run: {package.install}"
    return found


def contenders(scene: Scene) -> Iterator[Contender]:
    """Yield everybody who takes part, ours first. Collective."""
    out = left_out(scene.world.device.type == "cuda")
    ours = OurModel(scene)
    yield OurStep(ours)
    yield OurStep(ours, "all")
    if "sentence-transformers" not in out:
        yield from sbert_steps(scene)
    if "GradCache" not in out:
        yield GradCacheStep(scene)
    plain = PlainModel(scene)
    yield PlainLoop(plain, BY_HAND, by_hand(scene.world))
    for package in PACKAGES:
        if package.name not in out:
            yield PlainLoop(plain, f"{BY_HAND}, {package.name}", package.loss(scene.world))


def is_installed(module: str) -> bool:
    """Tell whether a module can be imported."""
    return importlib.util.find_spec(module) is not None
