"""`negpool report`: one page about a run that needs nothing but a browser, and its pictures as files beside it."""

import importlib.resources
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from launch.output import MEASURE_TITLES, in_figures
from launch.phases import clock
from launch.report.before_after import read_before_after
from launch.report.drawing import Pictures, as_png, as_svg
from launch.report.examples import read_examples
from launch.report.history import History, read_history
from launch.report.plots import draw_all
from launch.report.standing import Row, differences_of, rows_of, state_of, verdict_of, warnings_of
from launch.status import reading, run_status
from trainer.errors import InputError
from trainer.handoff.manifest import disk_error


def write_report(run: Path, out: Path | None) -> Path:
    """Write the page and its pictures into a folder, by default RUN/report; return the page's path. Raises InputError."""
    with reading(run):
        status, history = run_status(run), read_history(run)
        job_text = (run / "job.toml").read_text()
        job, rows = tomllib.loads(job_text), rows_of(status, history)
        results = status["results"] or {}
        pictures = draw_all(history, rows, results.get("measure") or job.get("stop", {}).get("measure", "ndcg@10"))
        page = render(
            "page.html",
            name=run.resolve().name,
            model=job["model"]["name"],
            data=", ".join(source["path"] for source in job.get("sources", {}).values()) or job["data"]["path"],
            state=state_of(status),
            verdict=verdict_of(status),
            warnings=warnings_of(status),
            tiles=_tiles(history, rows),
            rows=rows,
            differences=differences_of(status, rows),
            num_queries=results.get("num_test_queries"),
            figures=inlined(pictures),
            job=job_text,
            environment=_text_of(run / "environment.json"),
            **_or_reason("examples", lambda: read_examples(run)),
            **_or_reason("changes", lambda: read_before_after(run)),
        )
    return write_page(out or run / "report", page, pictures)


def render(template: str, **values: Any) -> str:
    """Return a page from a template of this folder; what it looks like is in it."""
    folder = importlib.resources.files("launch.report")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    jinja.undefined = jinja2.StrictUndefined
    return jinja.get_template(template).render(measures=MEASURE_TITLES, interval=in_figures, **values)


def inlined(pictures: Pictures) -> list[tuple[str, str, str]]:
    """Return name, title and SVG of each picture."""
    return [(name, title, as_svg(figure, name)) for name, (title, figure) in pictures.items()]


def write_page(folder: Path, page: str, pictures: Pictures) -> Path:
    """Write a page and its pictures; return the page's path. Raises InputError or MachineFailed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in pictures.items():
            (folder / f"{name}.png").write_bytes(as_png(figure))
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder / "index.html"


def _or_reason(name: str, read: Callable[[], Any]) -> dict[str, Any]:
    """Return what was read under a name for the page, or why there is nothing."""
    try:
        return {name: read(), f"no_{name}": ""}
    except InputError as error:
        return {name: None, f"no_{name}": str(error)}


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else "not recorded"


def _tiles(history: History, rows: Iterable[Row]) -> list[tuple[str, str]]:
    values = {row.name: row.values for row in rows}
    tiles = []
    if "trained" in values:
        tiles.append((f"{values['trained']['mrr@10']:.3f}", "MRR@10, trained model"))
    if history.steps:
        (*_, loss), rates = history.of_steps("loss")[1], history.of_steps("tokens_per_rank_per_s")[1]
        tiles += [
            (f"{max(history.steps):,}", "step" + "s" * (max(history.steps) != 1)),
            (f"{loss:.3f}", "loss of the last step"),
            (clock(sum(history.of_steps("time/step_s")[1])), "spent in steps"),
        ]
        tiles += [(f"{np.median(rates):,.0f}", "tokens per second and rank")] if rates else []
    tiles.append((str(history.mined_swaps), "version" + "s" * (history.mined_swaps != 1) + " of mined negatives swapped in"))
    audits = [line.get("audit") or {} for line in history.versions.values()]
    recall = [audit["recall"] for audit in audits if audit.get("recall") is not None]
    if recall:
        tiles.append((f"{min(recall):.3f}", "lowest audited recall"))
    return tiles
