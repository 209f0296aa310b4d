"""`negpool report`: one page about a run that needs nothing but a browser, and its pictures as files beside it."""

import importlib.resources
import time
import tomllib
from pathlib import Path
from typing import Any

import jinja2

from launch.output import MEASURE_TITLES, ROW_TITLES
from launch.report.examples import read_examples
from launch.report.history import History, read_history
from launch.report.plots import as_png, as_svg, draw_all
from launch.status import reading, run_status
from launch.view import clock
from trainer.errors import InputError
from trainer.handoff.manifest import disk_error


def write_report(run: Path, out: Path | None) -> Path:
    """Write the page and its pictures into a folder, by default RUN/report; return the page's path. Raises InputError."""
    folder = out or run / "report"
    with reading(run):
        status, history = run_status(run), read_history(run)
        pictures = draw_all(history)
        page = render(run, status, history, [(name, title, as_svg(figure, name)) for name, (title, figure) in pictures.items()])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in pictures.items():
            (folder / f"{name}.png").write_bytes(as_png(figure))
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder / "index.html"


def render(run: Path, status: dict[str, Any], history: History, figures: list[tuple[str, str, str]]) -> str:
    """Return the page."""
    job_text = (run / "job.toml").read_text()
    job = tomllib.loads(job_text)
    version: int | None = None
    examples: list[dict[str, Any]] = []
    reason = ""
    try:
        version, examples = read_examples(run)
    except InputError as error:
        reason = str(error)
    environment = run / "environment.json"
    source = importlib.resources.files("launch.report").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(
        name=run.resolve().name,
        model=job["model"]["name"],
        data=", ".join(source["path"] for source in job["sources"].values()) or job["data"]["path"],
        state=_state(status, history),
        tiles=_tiles(status, history),
        results=_results(status, history),
        measures=MEASURE_TITLES,
        figures=figures,
        version=version,
        examples=examples,
        no_examples=reason,
        job=job_text,
        environment=environment.read_text() if environment.exists() else "not recorded",
    )


def _state(status: dict[str, Any], history: History) -> str:
    trainer = status["trainer"]
    if not trainer:
        return "not started"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(trainer["heartbeat"]))
    return f"{trainer.get('phase', 'starting')} at step {trainer.get('step', 0)} of {trainer.get('num_steps', '?')}, {when} UTC"


def _tiles(status: dict[str, Any], history: History) -> list[tuple[str, str]]:
    tiles = []
    results = _results(status, history)
    if results:
        last = list(results)[-1]
        tiles.append((f"{results[last]['mrr@10']:.3f}", f"MRR@10, {last}"))
    if history.steps:
        last_step = history.steps[max(history.steps)]
        seconds = sum(line["time/step_s"] for line in history.steps.values())
        tokens = sorted(line["tokens_per_rank_per_s"] for line in history.steps.values())[len(history.steps) // 2]
        tiles += [
            (f"{max(history.steps):,}", "steps"),
            (f"{last_step['loss']:.3f}", "loss of the last step"),
            (clock(seconds), "spent in steps"),
            (f"{tokens:,.0f}", "tokens a second and rank"),
        ]
    tiles.append((str(len(history.swaps)), "versions of negatives used"))
    recall = [line["audit"]["recall"] for line in history.versions.values() if line["audit"].get("recall") is not None]
    if recall:
        tiles.append((f"{min(recall):.3f}", "lowest audited recall"))
    return tiles


def _results(status: dict[str, Any], history: History) -> dict[str, dict[str, float]]:
    """Return the test measures by the name of what was evaluated: the run's results, or what its evaluations say so far."""
    found = status["results"] or {}
    rows = {ROW_TITLES.get(name, name): found[name] for name in ("bm25", "untrained", "trained") if name in found}
    if rows:
        return rows
    titles = {0: ROW_TITLES["untrained"], max(history.steps, default=-1): ROW_TITLES["trained"]}
    measured = {step: line for step, line in history.measures.items() if "eval/mrr@10" in line and step in titles}
    return {titles[step]: {key: line[f"eval/{key}"] for key in MEASURE_TITLES} for step, line in measured.items()}
