"""Everybody's step on one number of ranks: settings searched, gradients compared, times in turn, a short training of each."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from gradcache.budget import BACKWARD_SHARE, measure_graphs
from launch.bench.job_path import encoded_by, load
from launch.bench.machine import start_peak
from launch.bench.pairs import Pairs, read_pairs
from launch.bench.peer import TRIAL_PAIRS, named
from launch.bench.peers.aloud import say_to
from launch.bench.peers.contender import Contender, Scene, Setting
from launch.bench.peers.exact import compare
from launch.bench.peers.peer_sizes import PeerSizes
from launch.bench.peers.plain_loop import PlainLoop
from launch.bench.peers.roster import OURS, contenders
from launch.bench.peers.training import ShortTraining
from launch.bench.turns import compared, take_turns, try_settings
from launch.counted import counted
from launch.ranks import answer
from trainer.errors import InputError
from trainer.world import join_world

FREE_SHARE = 0.8  # of the free memory, for graphs


class Searched(NamedTuple):
    """What a search found."""

    seconds: dict[str, float | None]  # of a step with each setting; None: it does not fit into memory; empty: there is one
    best: Setting | None  # None: none fits


def measure_on_ranks(folder: str, data: str, precision: str, is_quick: bool, sizes: dict[str, int]) -> dict[str, Any] | None:
    """Return everybody's row on rank 0, None elsewhere. Collective. folder: with the model, the gradient and the test."""
    world = join_world()
    try:
        of = PeerSizes(**sizes)
        scene = Scene(world, str(Path(folder) / "model"), of.max_tokens, precision, is_quick)
        found = WorldBench(scene, Path(folder), data, of).run()
        return found if world.speaks else None
    finally:
        world.leave()


class WorldBench:
    """The texts, and everybody who takes a step with them."""

    def __init__(self, scene: Scene, folder: Path, data: str, sizes: PeerSizes):
        self.scene, self.world, self.sizes, self.folder = scene, scene.world, sizes, folder
        _, tokenizer = load(scene.model, scene.max_tokens)
        most = max(sizes.queries, sizes.compared, sizes.steps * sizes.trained_queries)
        self.pairs = read_pairs(Path(data), tokenizer, most, scene.max_tokens, only="train")
        self.everybody = list(contenders(scene))

    def run(self) -> dict[str, Any]:
        """Return a row for everybody. Collective."""
        lack = self.lack_of_memory()
        too_large = {each.name: lack for each in self.everybody if each.keeps_graphs and lack is not None}
        fitting = [each for each in self.everybody if each.name not in too_large]
        searched = self.search(fitting)
        chosen = {name: found.best for name, found in searched.items() if found.best is not None}
        if OURS not in chosen:
            raise InputError("our step does not fit into this machine's memory; set --queries or --max-tokens lower")
        too_large |= {name: "it fits into memory with no setting" for name in searched.keys() - chosen.keys()}
        fitting = [each for each in fitting if each.name in chosen]
        rows: dict[str, Any] = {each.name: {"setting": dict(chosen[each.name])} for each in fitting}
        self.say("gradients beside the exact one")
        for each in fitting:
            rows[each.name] |= self.gradient(each, chosen[each.name])
        for name, row in self.times(fitting, chosen).items():
            rows[name] |= row
        for name, measures in self.trained(fitting, chosen).items():
            rows.setdefault(name, {})["mrr@10"] = measures["mrr@10"]
        pairs = self.share(0, self.sizes.queries)
        return {
            "ranks": self.world.num_ranks,
            "threads": torch.get_num_threads(),
            "pairs_per_rank": len(pairs),
            "tokens_per_rank": int(pairs.lengths.sum()),
            "rows": rows,
            "trials": {name: found.seconds for name, found in searched.items()},
            "too_large": too_large,
        }

    def share(self, first: int, count: int) -> Pairs:
        """Return this rank's share of some pairs, the same ones of all ranks whatever their number."""
        per_rank = count // self.world.num_ranks
        return self.pairs.select(first + self.world.rank * per_rank + np.arange(per_rank))

    def lack_of_memory(self) -> str | None:
        """Return why nobody can keep the graphs of a step of this size; None if they fit. Collective."""
        encoder, _ = load(self.scene.model, self.scene.max_tokens)
        pairs, device = self.share(0, self.sizes.queries), self.world.device
        encoder.to(device)
        rows = encoded_by(encoder, encoder, self.scene.precision, device)
        cost = measure_graphs(pairs.batch(min(8, len(pairs)), rows).towers[0])
        longest = [(len(table.lengths), int(table.lengths.max())) for table in pairs.tables]
        needed = BACKWARD_SHARE * sum(cost.of(num * length, length) for num, length in longest)
        is_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info()[0] if is_gpu else psutil.virtual_memory().available / self.world.num_ranks
        if self.world.all_max([int(needed - FREE_SHARE * free)])[0] <= 0:
            return None
        return f"its graphs of {len(pairs)} pairs need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"

    def search(self, fitting: list[Contender]) -> dict[str, Searched]:
        """Return what a step on a part of the batch takes everybody with every setting. Collective.

        Loops that differ by their loss alone are searched once.
        """
        share = self.share(0, self.sizes.queries)
        pairs = share.select(np.arange(min(TRIAL_PAIRS[self.world.device.type], len(share))))
        searched: dict[str, Searched] = {}
        of_loops: Searched | None = None
        for each in fitting:
            is_loop = isinstance(each, PlainLoop)
            searched[each.name] = of_loops if is_loop and of_loops is not None else self.tried(each, pairs)
            of_loops = searched[each.name] if is_loop else of_loops
        return searched

    def tried(self, each: Contender, pairs: Pairs) -> Searched:
        """Return what some pairs take a contender with each of its settings. Collective."""
        settings = each.settings(len(pairs))
        if len(settings) == 1:
            return Searched({}, settings[0])
        self.say(f"{each.name}: {len(settings)} settings are tried")
        ways = {named(setting): each.prepare(pairs, setting) for setting in settings}
        seconds = try_settings(ways, self.world, self.free_gradients)
        fitting = [(taken, number) for number, taken in enumerate(seconds.values()) if taken is not None]
        return Searched(seconds, settings[min(fitting)[1]] if fitting else None)

    def gradient(self, each: Contender, setting: Setting) -> dict[str, float]:
        """Return a contender's gradient beside the exact one, without dropout. Collective."""
        self.free_gradients()
        each.model.eval()
        each.prepare(self.share(0, self.sizes.compared), setting)()
        each.model.train()
        found = compare(each.model, each.name, self.folder / "exact.safetensors")
        self.free_gradients()
        return {"gradient_ratio": found.ratio, "gradient_cosine": found.cosine}

    def times(self, fitting: list[Contender], chosen: dict[str, Setting]) -> dict[str, dict[str, Any]]:
        """Return everybody's seconds and memory, dropout as the model has it. Collective."""
        pairs = self.share(0, self.sizes.queries)
        ways = {each.name: each.prepare(pairs, chosen[each.name]) for each in fitting}
        self.say(f"memory, and {counted(self.sizes.rounds, 'turn')} of everybody")
        self.free_gradients()
        turns = take_turns(ways, self.sizes.rounds, self.world, self.free_gradients, start_peak(self.world.device))
        rows = compared(turns, OURS, {})
        found = {}
        for name, row in rows.items():
            seconds = turns[name].seconds
            found[name] = {key: row[key] for key in ("seconds", "peak_gib")} | {"times_ours": row["ratio"]}
            found[name] |= {"least_s": round(min(seconds), 5), "most_s": round(max(seconds), 5)}
        return found

    def trained(self, fitting: list[Contender], chosen: dict[str, Setting]) -> dict[str, dict[str, float]]:
        """Return the measures of the model as it comes, and of everybody's after some steps. Collective."""
        if not self.sizes.steps:
            return {}
        training = ShortTraining(self.scene, self.folder)
        measures = {"untrained": training.evaluate()}
        for each in fitting:
            self.say(f"{each.name}: {self.sizes.steps} steps of training")
            size = self.sizes.trained_queries
            batches = (self.share(step * size, size) for step in range(self.sizes.steps))
            steps = map(each.prepare, batches, itertools.repeat(chosen[each.name]))
            measures[each.name] = training.train(each.model, steps)
        return measures

    def free_gradients(self) -> None:
        for each in self.everybody:
            each.model.zero_grad(set_to_none=True)

    def say(self, sentence: str) -> None:
        if self.world.speaks:
            say_to(self.folder / f"said-on-{self.world.num_ranks}.txt", f"{counted(self.world.num_ranks, 'rank')}: {sentence}")


if __name__ == "__main__":
    answer(measure_on_ranks)
