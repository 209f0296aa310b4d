"""What both sides of a run do now, in words, from what they last wrote into their status files.

The live view and `negpool status` say it with the same words. A key may be absent: a run of an earlier version has not all of
them, and a full disk keeps the least.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.counted import counted
from trainer.errors import ENDED

TRAINING, WATCHING, WAITING = "training", "watching", "waiting for negatives"
TELL_FROM_S = 2.0  # of a phase: what is over at once needs no time beside it
# In the miner's phases, by how they begin: the rate that says how fast it is.
RATES = (("encod", "tokens_per_s", "tokens/s"), ("search", "queries_per_s", "queries/s"))


@dataclass(frozen=True)
class Line:
    """What one side does: the words, then figures, the most important first; and how far it is."""

    text: str
    figures: tuple[str, ...] = ()
    done: int = 0
    total: int | None = None

    def fitted(self, width: int) -> str:
        """Return the words with as many figures as have room."""
        shown = self.text
        for figure in self.figures:
            if len(shown) + 3 + len(figure) > width:
                break
            shown += f"   {figure}"
        return shown


def trainer_line(status: Mapping[str, Any], ago_s: float = 0.0) -> Line:
    """Return what the trainer does; ago_s: how long ago it said so."""
    phase = status.get("phase", "loading the libraries")
    if phase == TRAINING:
        return _training(status)
    if phase == WAITING:
        what = "newer negatives" if status.get("swaps") else "the first negatives"
        return Line(f"waiting for {what}" + _since(status, ago_s))
    return _at_work(status, phase, ago_s, "texts a rank")


def miner_line(status: Mapping[str, Any], trainer: Mapping[str, Any], ago_s: float = 0.0) -> Line:
    """Return what the miner does, and of a waiting one, what it waits for; ago_s: how long ago it said so."""
    phase = status.get("phase", "loading the libraries")
    if phase == "starting":
        return _at_work(status, "reading the data", ago_s, "")
    if phase == WATCHING:
        return Line(f"watching for a checkpoint{_next_checkpoint(trainer)}")
    step = None if phase in ENDED else status.get("checkpoint_step")
    line = _at_work(status, phase if step is None else f"{phase}, checkpoint of step {step}", ago_s, "")
    rates = tuple(
        f"{status[key]:,.0f} {unit}" for start, key, unit in RATES if phase.startswith(start) and status.get(key) is not None
    )
    return Line(line.text, line.figures + rates, line.done, line.total)


def next_swap(trainer: Mapping[str, Any], miner: Mapping[str, Any]) -> str:
    """Return which negatives come into force next, and when; nothing where none are known to come."""
    swaps = trainer.get("swaps") or []
    newest = swaps[-1][1] if swaps else -1
    if trainer.get("phase") in ENDED or trainer.get("training_done") or miner.get("phase") in ENDED:
        return ""
    published = miner.get("negatives_version")
    if published is not None and published > newest:
        return f"next swap: negatives v{published}, mined and ready"
    if miner.get("phase") not in (None, "starting", WATCHING) and miner.get("version", -1) > newest:
        step = miner.get("checkpoint_step")
        return f"next swap: negatives v{miner['version']}, from " + ("BM25" if step is None else f"step {step}")
    return ""


def warnings_of(status: Mapping[str, Any]) -> list[str]:
    """Return the sentences of what a side warns of, each once."""
    found = status.get("warnings")
    said = [each.get("sentence") for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return list(dict.fromkeys(str(sentence) for sentence in said if sentence))


def clock(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:09."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _training(status: Mapping[str, Any]) -> Line:
    step, num_steps = status.get("step", 0), status.get("num_steps")
    of_all = "" if num_steps is None else f"/{num_steps}"
    if "loss" not in status:
        return Line(f"taking step {step + 1}{of_all}", (), step, num_steps)
    swaps = status.get("swaps") or []
    figures = [f"loss {status['loss']:.3f}"]
    if "eta_s" in status:
        figures.append(f"about {clock(status['eta_s'])} left")
    if status.get("tokens_per_rank_per_s") is not None:
        figures.append(f"{status['tokens_per_rank_per_s']:,.0f} tokens/s a rank")
    figures.append(f"negatives v{swaps[-1][1]}" if swaps else "in-batch negatives")
    return Line(f"step {step}{of_all}", tuple(figures), step, num_steps)


def _at_work(status: Mapping[str, Any], text: str, ago_s: float, unit: str) -> Line:
    done, total = status.get("done") or 0, status.get("total")
    if status.get("phase") in ENDED:  # what was last counted is over, too
        return Line(text)
    if total:
        return Line(text, (f"{done:,}/{total:,} {unit}".rstrip(),), done, total)
    return Line(text + _since(status, ago_s))


def _since(status: Mapping[str, Any], ago_s: float) -> str:
    began, heard = status.get("phase_since"), status.get("heartbeat")
    seconds = ago_s if began is None or heard is None else max(0.0, heard - began) + ago_s
    return f" since {clock(seconds)}" if seconds >= TELL_FROM_S else ""


def _next_checkpoint(trainer: Mapping[str, Any]) -> str:
    every, step, num_steps = (trainer.get(key) for key in ("checkpoint_every_steps", "step", "num_steps"))
    if every is None or step is None or num_steps is None:
        return ""
    following = (step // every + 1) * every
    if following >= num_steps:
        return "; no more are mined in this run"
    return f"; the next is at step {following}, in {counted(following - step, 'step')}"
