"""Our own step, `gradcache.cached_step`, as a job takes it."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from gradcache import InfoNCE, LossOptions, Temperature, cached_step
from launch.bench.job_path import encoded_by, load
from launch.bench.pairs import Pairs
from launch.bench.peer import TEMPERATURE
from launch.bench.peers.contender import Scene, Setting
from trainer.backends import parallelize
from trainer.job import OptimSettings, ParallelSettings

CHUNK_TOKENS = {"cpu": (2048, 4096, 8192), "cuda": (32768, 65536, 131072)}


class OurModel:
    """The model as a job loads it, for all ways in which we take a step."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.encoder, _ = load(scene.model, scene.max_tokens)
        self.parallel = parallelize(self.encoder, scene.world, ParallelSettings(), OptimSettings())
        self.rows = encoded_by(self.encoder, self.parallel.module, scene.precision, scene.world.device)
        self.temperature = Temperature(TEMPERATURE).to(scene.world.device)


class OurStep:
    """A cached step that keeps no graph, or all of them."""

    def __init__(self, opened: OurModel, keep_graphs: Literal[0, "all"] = 0):
        self.opened, self.keep_graphs = opened, keep_graphs
        self.keeps_graphs = keep_graphs == "all"
        self.name = "ours, all graphs kept" if self.keeps_graphs else "ours"

    @property
    def model(self) -> nn.Module:
        return self.opened.encoder

    def settings(self, pairs: int) -> Sequence[Setting]:
        scene = self.opened.scene
        sizes = CHUNK_TOKENS[scene.world.device.type]
        return [{"chunk_tokens": tokens} for tokens in (sizes[:2] if scene.is_quick else sizes)]

    def prepare(self, pairs: Pairs, setting: Setting) -> Callable[[], object]:
        opened, world = self.opened, self.opened.scene.world
        return functools.partial(
            cached_step,
            pairs.batch(len(pairs), opened.rows),
            loss=LossOptions(objective=InfoNCE()),
            temperature=opened.temperature,
            sync=opened.parallel.sync,
            group=world.group,
            chunk_tokens=setting["chunk_tokens"],
            keep_graphs=self.keep_graphs,
            seed=0,
            step=0,
        )
