"""`negpool plan`: the command. Heavy imports stand inside it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import JobCommand, JobFile, Json, Overrides
from launch.output import messages, print_json, results
from trainer.errors import InputError

plan_app = typer.Typer()

TEXTS = "Texts (default: the job's data, where they are here)"


@plan_app.command(cls=JobCommand)
def plan(
    job: JobFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(metavar="N,N,…", help="numbers of ranks")] = "8,64,512,4096",
    device: Annotated[str, typer.Option(help="h100, h200, a100, cpu (this machine, measured), or a TOML file")] = "h100",
    fabric: Annotated[
        str | None, typer.Option(help="nvlink-ib400, nvlink-ib200, ethernet-100, or a file of negpool bench fabric")
    ] = None,
    mode: Annotated[str, typer.Option(help="strong: one batch; weak: it grows with the ranks", metavar="strong|weak")] = "strong",
    query_tokens: Annotated[float | None, typer.Option(help="of a query, in the mean", rich_help_panel=TEXTS)] = None,
    passage_tokens: Annotated[float | None, typer.Option(help="of a passage, in the mean", rich_help_panel=TEXTS)] = None,
    training_queries: Annotated[int | None, typer.Option(min=1, help="of the data", rich_help_panel=TEXTS)] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="of the corpus", rich_help_panel=TEXTS)] = None,
    disk_gb_per_s: Annotated[float, typer.Option(min=0.001, help="of the disk that all ranks write checkpoints to")] = 1.0,
    miner_ranks: Annotated[int | None, typer.Option(min=1, help="of the same device; default: launch.mine_ranks")] = None,
    age: Annotated[int | None, typer.Option(min=1, metavar="STEPS", help="of negatives, at most: the miner ranks for it")] = None,
    watts: Annotated[float | None, typer.Option(min=0.001, help="of a rank at work; default: the device's most")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the plan as JSON and Markdown, and the device as TOML")] = None,
    as_json: Json = False,
) -> int:
    """Say what a job takes on other machines, before any is rented.

    Memory, time, network, disk and the miner's share for each number of
    ranks, and the first one that cannot run. Neither data nor weights
    need to be here. Only --device cpu measures: a short step.
    """
    from launch.plan.plan_tables import plan_parts
    from launch.tables import as_text

    if device == "cpu":
        messages().print("[dim]a short step is measured on this machine[/dim]")
    found = planned(
        job, overrides, ranks, device, fabric, mode, query_tokens, passage_tokens, training_queries, passages, disk_gb_per_s,
        miner_ranks, age, watts,
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        results().print(as_text(plan_parts(found)))
    if out is not None:
        from launch.plan.plan_files import write_plan

        write_plan(out, found)
    return 0


def planned(
    job: Path,
    overrides: list[str] | None,
    ranks: str,
    device: str,
    fabric: str | None,
    mode: str,
    query_tokens: float | None,
    passage_tokens: float | None,
    training_queries: int | None,
    passages: int | None,
    disk_gb_per_s: float,
    miner_ranks: int | None,
    age: int | None,
    watts: float | None,
) -> dict[str, Any]:
    """Return the plan that a command line asks for; arguments as `plan` takes them."""
    from launch.jobfile import read_job
    from launch.plan.plan_job import PlanRequest, plan_job
    from launch.plan.planned_texts import SaidTexts

    if mode not in ("strong", "weak"):
        raise InputError(f"--mode {mode} is no mode of scaling; expected strong or weak")
    texts = SaidTexts(
        query_tokens=query_tokens, passage_tokens=passage_tokens, num_queries=training_queries, num_passages=passages
    )
    asked = PlanRequest(
        ranks=_numbers(ranks),
        device=device,
        fabric=fabric,
        mode=mode,  # type: ignore[arg-type]
        texts=texts,
        disk_bytes_per_s=disk_gb_per_s * 1e9,
        miner_ranks=miner_ranks,
        age_steps=age,
        watts=watts,
    )
    return plan_job(read_job(job, overrides or []), asked)


def _numbers(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError as error:
        raise InputError(f"--ranks {words} is no list of numbers; expected some like 8,64,512") from error
