"""The pictures of a report about the versions of the negatives, in the order in which the miner published them."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from launch.report.drawing import BLUE, GREEN, RED, Pictures, Wanted, draw_stack, draw_wanted, name_places
from launch.report.history import History

AUDITED = {
    "recall": ("recall of the index", GREEN),
    "jaccard_with_last": ("overlap with the version before", BLUE),
    "share_suspected_false": ("suspected false negatives", RED),
}
SCORES = {"positive_scores": ("positives", GREEN, "o", -0.08), "scores": ("negatives", RED, "s", 0.08)}  # and their place
OfVersion = dict[int, dict[str, Any]]


def draw_versions(history: History) -> Pictures:
    """Return title and picture of what the miner has told of its versions, by name."""
    dropped, audits, seconds = (_some(history, name) for name in ("dropped", "audit", "seconds"))
    scored = {version: audit for version, audit in audits.items() if audit.get("scores") and _is_of_model(history, version)}
    wanted: dict[str, Wanted] = {
        "scores": ("Scores: median, and the middle 90 %", "score of the model", scored, lambda axes: _scores(axes, scored)),
        "filters": ("Candidates dropped, by filter", "candidates", dropped, lambda axes: _filters(axes, dropped)),
        "audit": ("Audit of each version", "share (0 to 1)", audits, lambda axes: _audit(axes, audits)),
        "refresh": ("Time of a refresh, by phase", "seconds", seconds, lambda axes: _refresh(axes, seconds)),
    }
    return draw_wanted("version of the negatives", wanted)


def _some(history: History, name: str) -> OfVersion:
    """Return what the versions have under a name, by version."""
    return {version: line[name] for version, line in history.versions.items() if line.get(name)}


def _is_of_model(history: History, version: int) -> bool:
    """Tell whether a model has scored a version: scores of BM25 compare with none of a model."""
    return history.versions[version].get("source") != "bm25"


def _scores(axes: Axes, audits: OfVersion) -> None:
    for name, (label, colour, marker, shift) in SCORES.items():
        known = [(place + shift, audit[name]) for place, audit in enumerate(audits.values()) if audit.get(name)]
        if known:
            axes.vlines([x for x, _ in known], [q["q05"] for _, q in known], [q["q95"] for _, q in known], color=colour)
            axes.plot([x for x, _ in known], [q["q50"] for _, q in known], marker, color=colour, label=label)
    name_places(axes, _names(audits))


def _filters(axes: Axes, counters: OfVersion) -> None:
    filters = sorted({name for dropped in counters.values() for name in dropped})
    parts = {name.replace("_", " "): [dropped.get(name, 0) for dropped in counters.values()] for name in filters}
    draw_stack(axes, _names(counters), parts)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _audit(axes: Axes, audits: OfVersion) -> None:
    for key, (label, colour) in AUDITED.items():
        known = [(place, audit[key]) for place, audit in enumerate(audits.values()) if audit.get(key) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=5, color=colour, label=label)
    axes.set_ylim(-0.03, 1.05)
    name_places(axes, _names(audits))


def _refresh(axes: Axes, seconds: OfVersion) -> None:
    phases = list(dict.fromkeys(phase for of_version in seconds.values() for phase in of_version))
    parts = {phase.replace("_", " "): [of_version.get(phase, 0) for of_version in seconds.values()] for phase in phases}
    draw_stack(axes, _names(seconds), parts)


def _names(versions: OfVersion) -> list[str]:
    return [f"v{version}" for version in versions]
