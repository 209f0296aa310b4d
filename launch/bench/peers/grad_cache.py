"""GradCache by its authors: their class, their distributed loss, a chunk's padding cut off, which they leave to the caller.

The package on PyPI installs a folder `gradcache`, the name of a package of ours, and imports itself as `grad_cache`. So it is
installed into a folder of its own and imported by the second name, under which the repository of its authors installs it, too.
Source: Gao et al. 2021, arXiv 2101.06983; github.com/luyug/GradCache.
"""

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from launch.bench.pairs import Pairs
from launch.bench.peer import TEMPERATURE
from launch.bench.peers.contender import Scene, Setting, ordered, row_settings
from launch.bench.peers.plain_loop import PlainModel, padded_parts

NAME, ON_PYPI = "grad_cache", "GradCache==0.0.1"
ROWS = {"cpu": (16, 32, 64), "cuda": (128, 512, 1024)}


def installed_folder() -> Path:
    """Return the folder that the package of PyPI is installed into, apart from ours: launch/install.sh does it for the tests."""
    return Path(sys.prefix) / "peers" / "GradCache"


def grad_cache() -> ModuleType:
    """Return the package of the authors; raises ImportError if it is not installed."""
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        folder = installed_folder() / "gradcache"
        spec = importlib.util.spec_from_file_location(NAME, folder / "__init__.py", submodule_search_locations=[str(folder)])
        if not (folder / "__init__.py").is_file() or spec is None or spec.loader is None:
            raise ImportError(f"no {NAME}, and nothing in {folder}")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that torch has moved since
        for part in ("grad_cache", "loss"):
            importlib.import_module(f"{NAME}.{part}")
    return sys.modules[NAME]


class GradCacheStep:
    """A step of GradCache with one model for both sides, synchronised with the last chunk of each."""

    name, keeps_graphs = "GradCache", False

    def __init__(self, scene: Scene):
        self.scene, self.package = scene, grad_cache()
        self.opened = PlainModel(scene)

    @property
    def model(self) -> nn.Module:
        return self.opened.bare

    def settings(self, pairs: int) -> Sequence[Setting]:
        sizes = ROWS[self.scene.world.device.type]
        return row_settings("chunk_size", pairs, sizes[:2] if self.scene.is_quick else sizes)

    def prepare(self, pairs: Pairs, setting: Setting) -> Callable[[], object]:
        device, is_shared = self.scene.world.device, self.scene.world.group is not None
        parts = [padded_parts(table, setting["chunk_size"], device) for table in ordered(pairs, setting).tables]
        loss = self.package.loss.DistributedContrastiveLoss() if is_shared else self.package.loss.SimpleContrastiveLoss()
        cache = self.package.grad_cache.GradCache(
            models=[self.opened.called, self.opened.called],
            chunk_sizes=setting["chunk_size"],
            loss_fn=functools.partial(_of_scores, loss),
            split_input_fn=lambda side, chunk_size: side,  # each chunk is padded to its own longest text already
        )
        return functools.partial(cache, *parts, no_sync_except_last=is_shared)


def _of_scores(loss: Callable[..., Tensor], query_BD: Tensor, passage_BD: Tensor) -> Any:
    """Return their loss with a temperature, which theirs has none of."""
    return loss(query_BD / TEMPERATURE, passage_BD)
