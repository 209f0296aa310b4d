"""The commands. Each reads its input, calls one function of trainer, mining or launch, and prints what came out.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from typing import Annotated, Any

import typer
from rich.markup import escape

from launch.bench_job_commands import bench_app
from launch.data_commands import data_app, init_app
from launch.help import Commands
from launch.looking_commands import looking_app
from launch.mine_commands import mine_app
from launch.model_commands import model_app
from launch.options import AllowChange, JobCommand, JobFile, Json, Overrides
from launch.output import messages, print_json, results, start_logging
from launch.plan_commands import plan_app
from launch.recipe import as_typed, two_shells
from trainer.errors import EXIT_FAILED, EXIT_STOPPED

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(init_app)
app.add_typer(model_app)
app.add_typer(mine_app)
app.add_typer(looking_app)
app.add_typer(plan_app)
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
def train(
    job: JobFile,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="print what the job and its loss.preset set, and end")] = False,
    allow_change: AllowChange = False,
    as_json: Json = False,
) -> int:
    """Train only, on one rank or on those of a launcher.

    Launchers are torchrun, srun, accelerate launch and deepspeed, with -m negpool.
    """
    if explain:
        return _explain(job, overrides or [], as_json)
    from launch.sides import train_side

    outcome = train_side(job, overrides or [], allow_change)
    if as_json and outcome is not None:
        print_json(outcome.as_json())
    return 0 if outcome is None or outcome.finished else EXIT_STOPPED


def _explain(job: JobFile, overrides: list[str], as_json: bool) -> int:
    from launch.explain import explain, explain_table
    from launch.jobfile import read_job

    found = explain(read_job(job, overrides))
    if as_json:
        print_json(found)
    else:
        results().print(explain_table(found))
        for remark in found["remarks"]:
            messages().print(escape(remark))
    return 0


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
    device: Annotated[str | None, typer.Option(help="of a rank, as negpool plan takes it: say what the job will take")] = None,
    fabric: Annotated[str | None, typer.Option(help="what joins the ranks, as negpool plan takes it")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show commands and scripts, and what Slurm thinks of them")] = False,
    allow_change: AllowChange = False,
    as_json: Json = False,
) -> int:
    """Submit trainers and miner to a Slurm cluster.

    With --device and --fabric a plan says first what it will take.
    """
    from launch.early import check_early
    from launch.jobfile import read_job
    from launch.plan.submission import foresee_submission, refuse_impossible, submission_words

    jobs = read_job(job, overrides or [])
    num_ranks = nodes * (gpus_per_node or jobs.launch.train_ranks)
    refuse_impossible(jobs, num_ranks)
    check_early(jobs)
    from launch.submit import Size
    from launch.submit import submit as submit_job

    start_logging()
    planned = None if device is None else foresee_submission(jobs, num_ranks, save_seconds, device, fabric)
    for warning in [] if planned is None else planned["warnings"]:
        messages().print(f"[yellow]warning: {escape(warning)}[/yellow]")
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
        print_json(found if planned is None else found | {"plan": planned})
    else:
        from launch.submit import describe

        if planned is not None:
            results().print(submission_words(planned), markup=False)
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
