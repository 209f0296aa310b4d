"""The commands. Each reads its input, calls one function of trainer, mining or launch, and prints what came out.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from launch.bench_commands import bench_app
from launch.data_commands import data_app, init_app
from launch.help import Commands
from launch.looking_commands import looking_app
from launch.model_commands import model_app
from launch.options import SHORT, AllowChange, JobCommand, JobFile, Json, Overrides, quoted, setting_argument, with_short
from launch.output import messages, print_json, results, start_logging
from launch.recipe import as_typed, two_shells
from trainer.errors import EXIT_FAILED, EXIT_STOPPED, InputError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(init_app)
app.add_typer(model_app)
app.add_typer(looking_app)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from launch.versions import library_version

        results().print(f"negpool {library_version('negpool') or 'of a checkout that is not installed'}")
        raise typer.Exit


@app.callback()
def negpool(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train dense retrievers with large pools of negatives, mined while you train."""


@app.command(cls=JobCommand, epilog=two_shells())
def run(
    job: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what it would do, and start nothing")] = False,
    allow_change: AllowChange = False,
    as_json: Json = False,
) -> int:
    """Train and mine together on this machine, with a live view."""
    from launch.early import check_early, mpiexec_path
    from launch.imports import lasting_imports
    from launch.jobfile import read_job
    from launch.sides import refuse_changed
    from trainer.handoff.claim import refuse_live

    jobs = read_job(job, overrides or [])
    refuse_live(jobs.train.run.folder, "launch", "trainer", "miner")
    refuse_changed(jobs, allow_change)
    check_early(jobs)
    mpiexec_path()
    messages().print(f"[dim]negpool run {escape(str(job))}: reading the data[/dim]")  # imports take seconds
    if dry_run:
        return _foresee(jobs, as_json)
    with lasting_imports():
        from launch.main_job import run_main_job

    start_logging()
    outcome = run_main_job(jobs, as_typed(), messages(), allow_change)
    if as_json:
        print_json(outcome)
    return 0 if outcome["finished"] else EXIT_STOPPED


def _foresee(jobs: Any, as_json: bool) -> int:
    from launch.foresee import foresee
    from launch.foreseen import foreseen_text

    found = foresee(jobs)
    if as_json:
        print_json(found)
    else:
        results().print(foreseen_text(found), soft_wrap=False)
    return 0


@app.command(cls=JobCommand, epilog=two_shells())
def train(job: JobFile, overrides: Overrides = None, allow_change: AllowChange = False, as_json: Json = False) -> int:
    """Train only, on one rank or on those of a launcher.

    Launchers are torchrun, srun, accelerate launch and deepspeed, with -m negpool.
    """
    from launch.sides import train_side

    outcome = train_side(job, overrides or [], allow_change)
    if as_json and outcome is not None:
        print_json(outcome.as_json())
    return 0 if outcome is None or outcome.finished else EXIT_STOPPED


class Form(enum.StrEnum):
    """What `mine --out` writes; names as in mining/export.py."""

    ids = "ids"
    sentence_transformers = "sentence-transformers"
    tevatron = "tevatron"
    flagembedding = "flagembedding"


@app.command(cls=JobCommand, epilog=two_shells())
@with_short(SHORT)
def mine(
    words: Annotated[
        list[str] | None, setting_argument("job file, where there is one; settings", metavar="[JOB.toml] [section.key=value]...")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one refresh from the newest checkpoint, then exit")] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help='without a run: model, run, "bm25", or folder of queries.npy and passages.npy'),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="data set; default: the job's data.path")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write what was mined, or a run's newest negatives, to FILE.jsonl or .parquet")
    ] = None,
    form: Annotated[
        Form, typer.Option(metavar="FORM", help="of --out: ids, sentence-transformers, tevatron or flagembedding")
    ] = Form.ids,
    show: Annotated[
        str | None, typer.Option(metavar="QUERY_ID", help="show a query, named by its id or its text, and what it gets")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="one refresh from this one, such as step-00000200, then exit")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="figures for Prometheus on 127.0.0.1; 0: any free port")
    ] = None,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Mine hard negatives for a run, or with any model to a file.

    With --show it shows what was mined. Under mpiexec or srun several ranks share the work.
    """
    from launch.mine import Stopped, mine_model, read_newest, shown_parts, written_parts

    job, overrides = _job_and_overrides([*(words or []), *short], data)
    if any(override.startswith("model.") for override in short):
        _refuse_without_model(model)
    found: dict[str, Any] | None
    if model is not None:
        if out is None and show is None:
            raise InputError("nothing would come of it; give --out FILE.jsonl, or --show QUERY_ID")
        try:
            found = mine_model(job, overrides, model, out, form.value, show)
        except Stopped:
            return EXIT_STOPPED
    elif job is None:
        raise InputError("there is nothing to mine from; give a job file, or --model and --data")
    elif out is not None or show is not None:
        found = read_newest(job, overrides, out, form.value, show)
    else:
        return _mine_for_run(job, overrides, once, checkpoint, metrics_port, as_json)
    if found is not None and as_json:
        print_json(found)
    elif found is not None:
        for part in [*([shown_parts(found)] if "query_id" in found else []), *([written_parts(found)] if "out" in found else [])]:
            results().print(part)
    return 0


def _refuse_without_model(model: str | None) -> None:
    """Raise InputError where options of a model would have no effect."""
    from mining.find.supplied import holds_vectors

    if model is None:
        raise InputError("options of a model go with --model; the checkpoints of a run say how their texts are read")
    if model == "bm25" or holds_vectors(Path(model)):
        raise InputError(f"--model {model} encodes nothing: options of a model have no effect on it")


def _mine_for_run(
    job: Path, overrides: list[str], once: bool, checkpoint: str | None, metrics_port: int | None, as_json: bool
) -> int:
    from launch.sides import mine_side

    how = mine_side(job, overrides, once, checkpoint, metrics_port)
    if as_json:
        print_json({"ended": how})
    return 0 if how == "finished" else EXIT_STOPPED


def _job_and_overrides(words: list[str], data: Path | None) -> tuple[Path | None, list[str]]:
    """Return the job file, where the first word is one, and the overrides; --data is data.path."""
    job = Path(words[0]) if words and "=" not in words[0] else None
    return job, [*words[job is not None :], *([] if data is None else [f"data.path={quoted(str(data))}"])]


@app.command(cls=JobCommand)
def submit(
    job: JobFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="of the trainers")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="a rank for each; 0: as many ranks as section launch says")] = 0,
    miner_nodes: Annotated[int, typer.Option(min=0, help="0: train only")] = 1,
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="cores")] = 4,
    partition: Annotated[str | None, typer.Option(help="default: the cluster's")] = None,
    time: Annotated[str | None, typer.Option(help="limit of one start: 30, 4:00:00 or 2-0; default: the partition's")] = None,
    save_seconds: Annotated[int, typer.Option(min=1, help="before the limit, to save in")] = 120,
    max_restarts: Annotated[int, typer.Option(min=0, help="of each job, in a row without a new checkpoint")] = 10,
    together: Annotated[bool, typer.Option("--together", help="one heterogeneous job for both sides")] = False,
    sbatch: Annotated[list[str] | None, typer.Option(help="more of its options: --sbatch=--account=me; repeatable")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show commands and scripts, and what Slurm thinks of them")] = False,
    allow_change: AllowChange = False,
    as_json: Json = False,
) -> int:
    """Submit trainers and miner to a Slurm cluster."""
    from launch.early import check_early
    from launch.jobfile import read_job

    jobs = read_job(job, overrides or [])
    check_early(jobs)
    from launch.submit import Size
    from launch.submit import submit as submit_job

    start_logging()
    size = Size(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        miner_nodes=miner_nodes,
        cpus_per_rank=cpus_per_rank,
        partition=partition,
        time=time,
        save_seconds=save_seconds,
        max_restarts=max_restarts,
        together=together,
        options=tuple(sbatch or ()),
    )
    found = submit_job(jobs, size, dry_run, allow_change)
    if as_json:
        print_json(found)
    else:
        from launch.submit import describe

        results().print(describe(found), markup=False)
    return 0


@app.command(cls=JobCommand)
def check(
    job: JobFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes on this machine")] = 1,
    backend: Annotated[str | None, typer.Option(help="ddp, fsdp2, zero0, zero1, zero2 or zero3; default: the job's")] = None,
    queries: Annotated[int, typer.Option(min=2, help="of the compared step; its reference holds all graphs")] = 32,
    as_json: Json = False,
) -> int:
    """Prove that a job's gradients are exact.

    The cached and tiled step, on several ranks, is compared with one graph in one process; exit 1 if they differ.
    """
    from launch.early import check_early
    from launch.jobfile import read_job

    words = [*(overrides or []), *([f"parallel.backend={backend}"] if backend else [])]
    check_early(read_job(job, words), mines=False)
    from launch.check import check_job
    from launch.tables import as_text, check_parts

    start_logging()
    found = check_job(job, words, ranks, queries)
    if as_json:
        print_json(found)
    else:
        results().print(as_text(check_parts(found)))
    return 0 if found["ok"] else EXIT_FAILED
