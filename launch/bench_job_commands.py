"""`negpool bench` of a job: how it scales, one rank among many, trainer beside miner. Heavy imports stand inside the commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench_commands import bench_app, print_bench, print_found
from launch.options import JobCommand, JobFile, Json, Out, Overrides, Rounds
from launch.output import start_logging
from trainer.errors import EXIT_FAILED, InputError


@bench_app.command("scaling", cls=JobCommand)
def bench_scaling(
    job: JobFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="sizes, as 1,2,4")] = "1,2",
    mode: Annotated[str, typer.Option(help="strong: the batch stays; weak: each rank's share of it stays")] = "strong,weak",
    rounds: Rounds = 3,
    data: Annotated[str, typer.Option(help="job: its own texts; or made ones: made-256, made-64, made-mixed")] = "job",
    fabric: Annotated[str | None, typer.Option(help="calibrated one, for the peak bandwidth: a file or a known name")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="as jobs of Slurm, one for each size and round")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="a rank for each; 0: launch.train_ranks on cores (--slurm)")] = 0,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="cores; default: 4 (--slurm)")] = None,
    partition: Annotated[str | None, typer.Option(help="default: the cluster's (--slurm)")] = None,
    time: Annotated[str | None, typer.Option(help="limit of a job, as 30 or 1:00:00; default: the partition's (--slurm)")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="more options: --sbatch=--account=me (--slurm)")] = None,
    warm_up: Annotated[int, typer.Option(min=1, help="steps before those that are measured")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="measured steps of a start")] = 50,
    out: Annotated[Path | None, typer.Option(help="folder that keeps all; default: runs/scaling/JOB")] = None,
    as_json: Json = False,
) -> int:
    """Measure a job's step on several numbers of ranks.

    Each size has a start of its own in each round, and every rank as
    many cores in all sizes. What is measured is kept in --out: an
    interrupted command goes on from there. Tables and pictures: time,
    efficiency, phases, bytes, bandwidth, memory.
    """
    from launch.bench.scaling.trial_jobs import Allocation
    from launch.bench.scaling.trials import read_modes, read_ranks
    from launch.early import check_early
    from launch.jobfile import read_job

    sizes, modes = read_ranks(ranks), read_modes(mode)
    of_slurm = {"--gpus-per-node": gpus_per_node, "--cpus-per-rank": cpus_per_rank, "--partition": partition, "--time": time}
    if (idle := next((name for name, value in (of_slurm | {"--sbatch": sbatch}).items() if value), None)) and not slurm:
        raise InputError(f"{idle} has no effect on this machine; add --slurm, or leave it out")
    jobs = read_job(job, overrides or [])
    if data == "job":
        check_early(jobs, mines=False)
    from launch.bench.scaling.run import ScalingPlan
    from launch.bench.scaling.run import bench_scaling as run_bench

    start_logging()
    options = tuple(sbatch or ())
    cluster = {"gpus_per_node": gpus_per_node, "cpus_per_rank": cpus_per_rank or 4, "partition": partition, "time": time}
    allocation = Allocation(**cluster, options=options) if slurm else None  # type: ignore[arg-type]
    plan = ScalingPlan(ranks=sizes, modes=modes, rounds=rounds, data=data, warm_up=warm_up, steps=steps)
    found = run_bench(jobs, plan, out or Path("runs") / "scaling" / job.stem, allocation, fabric)
    return _print_scaling(found, as_json)


def _print_scaling(found: dict[str, Any], as_json: bool) -> int:
    from launch.bench.report import write_tables
    from launch.bench.scaling.curves import pictures
    from launch.bench.scaling.sheets import scaling_parts

    parts, drawn, folder = scaling_parts(found), pictures(found), Path(found["out"])
    write_tables(folder, "scaling", found, parts, list(drawn))
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    print_found(found, parts, as_json)
    return EXIT_FAILED if found["failed"] else 0


@bench_app.command("emulate", cls=JobCommand)
def bench_emulate(
    job: JobFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="numbers of ranks, each 2 or more")] = "64,512,4096",
    queries_per_rank: Annotated[
        int | None, typer.Option(min=1, help="queries of each rank; default: batch.queries are of all ranks")
    ] = None,
    rounds: Rounds = 3,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Measure one rank among many on this machine.

    The other ranks do not exist: what they would send is made up here,
    at full size, from this rank's own. Memory and compute of the one
    rank are real, communication is none. Training is not touched.
    """
    from launch.bench.emulate import bench_emulate as run_bench
    from launch.bench.emulate import read_ranks
    from launch.emulate_tables import emulate_parts

    found = run_bench(job, overrides or [], read_ranks(ranks), queries_per_rank, rounds)
    return print_bench("emulate", found, emulate_parts(found), out, as_json)


@bench_app.command("overlap", cls=JobCommand)
def bench_overlap(
    job: JobFile,
    overrides: Overrides = None,
    shares: Annotated[
        str | None,
        typer.Option(
            metavar="1,all,…",
            help="the miner's: numbers of cores or GPUs of its own; all: both sides use all cores; all:N: so, and the miner at "
            "niceness N; on one GPU a share of its memory, as 0.3; default: a few that the machine has",
        ),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="MRR@10 that is to be reached; default: what the run with the lowest end reached")
    ] = None,
    rounds: Rounds = 2,
    out: Annotated[Path, typer.Option(help="folder of the report, and of all runs: the same command goes on there")] = Path(
        "runs/overlap"
    ),
    as_json: Json = False,
) -> int:
    """Measure trainer and miner together against each alone.

    Real runs of a job, by each division of the machine: slow-down of
    both sides, age of the negatives, and which division reaches an
    MRR@10 on dev first. No run evaluates while it is timed. The
    quickstart takes an hour on two cores.
    """
    from launch.early import check_early
    from launch.jobfile import read_job

    check_early(read_job(job, overrides or []))
    from launch.bench.overlap.measure import bench_overlap as run_bench
    from launch.bench.overlap.pictures import check_pictures, write_overlap_report
    from launch.overlap_tables import overlap_parts

    check_pictures()
    found = run_bench(job, overrides or [], shares, target, rounds, out)
    parts = overlap_parts(found)
    print_found(found, parts, as_json)
    write_overlap_report(out, found, parts)
    return 0
