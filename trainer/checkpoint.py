"""Checkpoints: `encoder/` for the miner and for people, `state/` for resume, one manifest, one rename.

The loop stops only while a copy is made; a thread writes it. Ranks write what they hold of the state, rank 0 waits for
all parts, adds the encoder and publishes. The price is a copy of what a rank writes in the host's memory.
"""

import copy
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import MachineFailed, MustNotGoOn, exit_code
from trainer.handoff.claim import Claim
from trainer.handoff.manifest import is_disk_error, publish_version, write_latest
from trainer.handoff.retry import patiently
from trainer.handoff.weights import Checkpoint, checkpoint_name, checkpoints_folder, is_finite
from trainer.last_good import last_good
from trainer.parts import Fragment, Parts, part_name, write_part
from trainer.state import TrainState
from trainer.world import World

log = logging.getLogger(__name__)

PARTS = ".parts-"  # prefix of the folder where ranks leave their parts
POLL_S = 0.02


class Saver:
    """Writes checkpoints behind the loop's back, one at a time."""

    def __init__(self, run: Path, world: World, claim: Claim):
        self._run, self._world, self._claim = run, world, claim
        self._copies: dict[str, torch.Tensor] = {}  # used again: fresh pages cost more than the copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: TrainState,
        write_encoder: Callable[[Path], dict[str, Any]] | None,
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state after `state.step`, then write and publish it in the background. Waits for the one before.

        write_encoder: fills a folder from weights that stay what they are until `wait` returns, and gives JSON values for the
        manifest; None but on rank 0. Every rank calls it.
        """
        self.wait()
        begun = time.perf_counter()
        kept, writers = state.kept_fragments()
        fragments = [self._copy(fragment) for fragment in kept]
        values = copy.deepcopy(state.values())  # lists among them grow while the thread writes
        # A rank that outlived its run's last start leaves its part where nobody looks.
        parts = checkpoints_folder(self._run) / f"{PARTS}{self._claim.number}-{checkpoint_name(state.step)}"

        def write() -> None:
            started = time.perf_counter()
            folder = checkpoints_folder(self._run) / checkpoint_name(values["step"])
            names = [part_name(rank, self._world.num_ranks) for rank in sorted(writers)]
            self._refuse_broken(fragments, values["step"])  # no part, no checkpoint, whichever rank it is
            if self._world.rank in writers:
                patiently(lambda: self._write_part(parts, fragments), f"{folder}")
            if write_encoder is not None:
                patiently(lambda: self._publish(folder, parts, names, values, write_encoder), f"{folder}")
                self._tidy(parts, on_published)
                log.info("step %d: saved %s, in %.1f s behind the loop", values["step"], folder, time.perf_counter() - started)
                _warn_if_long(time.perf_counter() - begun)

        self._thread = threading.Thread(target=self._run_thread, args=(write, state.step), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is published. Collective.

        If it could not be written, raises what that rank's thread raised, MachineFailed for a disk that refuses, MustNotGoOn for
        what is not finite; the others leave with the same code.
        """
        while True:
            is_alive = self._thread is not None and self._thread.is_alive()
            error = self._error  # read after: a thread that has ended has left it
            code, is_writing = self._world.all_max([0 if error is None else exit_code(error), int(is_alive)])
            if error is not None:
                raise error
            if code:  # nobody waits for parts that never come
                raise SystemExit(code)
            if not is_writing:
                return
            time.sleep(POLL_S)

    def has_failed(self) -> bool:
        """Tell whether this rank could not write the last checkpoint: `wait` is to be called soon, by all."""
        return self._error is not None

    def _run_thread(self, write: Callable[[], None], step: int) -> None:
        try:
            write()
        except MachineFailed as error:
            error.step = step  # the loop has gone on meanwhile
            self._error = error
        except BaseException as error:
            self._error = error

    def _copy(self, fragment: Fragment) -> Fragment:
        """Return the fragment with its values in this saver's own memory."""
        held = self._copies.get(fragment.name)
        if held is None or len(held) != len(fragment.values):
            held = torch.empty(len(fragment.values), pin_memory=fragment.values.is_cuda)
            self._copies[fragment.name] = held
        held.copy_(fragment.values)
        return Fragment(fragment.name, fragment.start, fragment.numel, held)

    def _refuse_broken(self, fragments: list[Fragment], step: int) -> None:
        for fragment in fragments:
            if not is_finite(fragment.values):
                raise MustNotGoOn(
                    f"step {step}: {fragment.name} is not finite and was not saved; {last_good(self._run)}; set a lower optim.lr "
                    "or a wider precision.encode, and go on from there in a new run.folder"
                )

    def _write_part(self, parts: Path, fragments: list[Fragment]) -> None:
        parts.mkdir(parents=True, exist_ok=True)
        write_part(parts / part_name(self._world.rank, self._world.num_ranks), fragments)

    def _publish(
        self,
        folder: Path,
        parts: Path,
        names: list[str],
        values: dict[str, Any],
        write_encoder: Callable[[Path], dict[str, Any]],
    ) -> None:
        """Put all together, publish it and point LATEST at it; may be called again where that failed. Rank 0 only.

        names: of the parts.
        """
        fields = {"step": values["step"]}

        def write(staging: Path) -> None:
            (staging / "encoder").mkdir()
            fields.update(write_encoder(staging / "encoder"))
            self._wait_for_parts(parts, names)
            (staging / "state").mkdir()
            for name in names:
                _link(parts / name, staging / "state" / name)
            (staging / "state" / "trainer.json").write_text(json.dumps(values))

        publish_version(folder, write, fields, self._claim.check)
        self._claim.check()
        write_latest(folder.parent, folder.name)

    def _tidy(self, parts: Path, on_published: Callable[[], None]) -> None:
        """Do what follows a checkpoint that is safe; a disk that refuses it ends no run."""
        shutil.rmtree(parts, ignore_errors=True)
        try:
            on_published()
        except Exception as error:
            if not is_disk_error(error):
                raise
            log.warning("old checkpoints stay until the next is published: %s", error)

    def _wait_for_parts(self, parts: Path, names: list[str]) -> None:
        deadline = time.monotonic() + self._world.timeout_s
        while missing := [name for name in names if not (parts / name).exists()]:
            if time.monotonic() > deadline:
                raise MachineFailed(f"no checkpoint: {', '.join(missing)} did not come within {self._world.timeout_s:g} s")
            time.sleep(POLL_S)


def _warn_if_long(seconds: float) -> None:
    """Say so where a save might not be done between a time limit's signal and the limit: a step and a save come before it."""
    limit = float(os.environ.get("NEGPOOL_SAVE_SECONDS", "inf"))  # as `negpool submit` was told
    if seconds > limit / 2:
        log.warning(
            "a save takes %.1f s, more than half of the %g s before the time limit that it has there; "
            "submit with --save-seconds %d or more",
            seconds, limit, math.ceil(3 * seconds),
        )  # fmt: skip


def _link(file: Path, place: Path) -> None:
    """Give a file a second name, so that it stays where it is until the checkpoint is published."""
    try:
        os.link(file, place)
    except OSError:  # a file system without links: the price is a second copy for a moment
        shutil.copy2(file, place)


def clean_parts(run: Path) -> None:
    """Delete the parts of checkpoints that were never published; only at the start of a run."""
    for leftover in checkpoints_folder(run).glob(f"{PARTS}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_weights(checkpoint: Checkpoint, encoder: torch.nn.Module, world: World) -> None:
    """Take over the trained weights of a verified checkpoint into a bare encoder. Raises TornVersion. Collective."""
    parts = _open_parts(checkpoint, world)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad:
                _read_for_all(parts, Fragment(f"parameter.{name}", 0, parameter.numel(), parameter.view(-1)), world)


def load_state(checkpoint: Checkpoint, state: TrainState, world: World) -> None:
    """Take over counters, moments and temperature of a verified checkpoint, on every rank. Raises TornVersion. Collective.

    Under FSDP2 also the trained weights: each rank reads its own rows.
    """
    parts = _open_parts(checkpoint, world)
    state.load(json.loads((checkpoint.folder / "state" / "trainer.json").read_text()))
    for fragment in state.fragments():
        kind, _, name = fragment.name.partition(".")
        if kind == "parameter" and not state.parallel.takes_weights:
            continue
        if kind == "average" and not parts.numel(fragment.name):  # ema.decay was set later: it begins at the weights
            fragment = replace(fragment, name=f"parameter.{name}")
        if state.is_whole(kind):
            _read_for_all(parts, fragment, world)
        else:
            fragment.values.copy_(parts.read(fragment.name, fragment.start, len(fragment.values)))


def _open_parts(checkpoint: Checkpoint, world: World) -> Parts:
    """Return the parts of a checkpoint; only rank 0 opens those of which it reads nothing. Collective."""
    folder = checkpoint.folder / "state"
    parts = Parts(folder) if world.speaks else None
    index = world.broadcast(None if parts is None else parts.index)
    return Parts(folder, index) if parts is None else parts


def _read_for_all(parts: Parts, fragment: Fragment, world: World) -> None:
    """Fill what all ranks hold alike: rank 0 reads, the others hear it from there. Collective."""
    values = fragment.values
    parts.check(fragment.name, fragment.start, len(values))  # all ranks look, so that all of them raise
    if world.speaks:
        values.copy_(parts.read(fragment.name, fragment.start, len(values)))
    if world.group is not None:
        dist.broadcast(values, 0, group=world.control if values.device.type == "cpu" else world.group)
