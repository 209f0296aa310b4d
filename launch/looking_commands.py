"""`negpool status`, `settings`, `report`, `compare` and `doctor`: commands that look. Heavy imports stand inside them."""

from pathlib import Path
from typing import Annotated

import typer

from launch.options import Json
from launch.output import messages, print_json, results, start_logging
from trainer.errors import EXIT_FAILED

looking_app = typer.Typer()


@looking_app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    watch: Annotated[bool, typer.Option("--watch", help="show it anew every second until the run has ended")] = False,
    as_json: Json = False,
) -> int:
    """Say where a run stands, and what is wrong with it.

    Both sides, their speed, the age of the negatives, the last evaluation, the time left.
    """
    from launch.status import describe_run, run_status, watch_run

    found = watch_run(folder, messages() if as_json else results()) if watch else run_status(folder)
    if as_json:
        print_json(found)
    elif not watch:
        results().print(describe_run(found))
    return 0


def _sections(incomplete: str) -> list[str]:
    from launch.jobfile import SECTIONS

    return [name for name in SECTIONS if name.startswith(incomplete)]


@looking_app.command()
def settings(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="as in section.key; default: all", autocompletion=_sections)
    ] = None,
    as_json: Json = False,
) -> int:
    """List what a job file can set, with types and defaults."""
    from launch.settings import all_settings, settings_text

    found = all_settings(section)
    if as_json:
        print_json(found)
    else:
        results().print(settings_text(found))
    return 0


@looking_app.command()
def objectives(as_json: Json = False) -> int:
    """List the losses that a job file can name."""
    from launch.objectives import all_objectives, objectives_text

    found = all_objectives()
    if as_json:
        print_json(found)
    else:
        results().print(objectives_text(found))
    return 0


@looking_app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="where runs will live; under mpiexec or srun seen from all nodes")] = Path("runs"),
    as_json: Json = False,
) -> int:
    """Say what this machine has and lacks.

    MPI, GPUs, NCCL, FAISS, Slurm, a sound shared folder; exit 1 if something needed is missing or wrong.
    """
    from launch.doctor import examine
    from launch.tables import as_text, doctor_parts

    found = examine(folder)
    if found is None:
        return 0
    if as_json:
        print_json(found)
    else:
        results().print(as_text(doctor_parts(found)))
    return 0 if found["ok"] else EXIT_FAILED


@looking_app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    out: Annotated[Path | None, typer.Option(help="folder to make or renew; default: RUN/report")] = None,
    as_json: Json = False,
) -> int:
    """Write a page about a run, with plots and examples.

    It needs nothing but a browser; its pictures stand beside it.
    """
    from launch.report.page import write_report

    start_logging()
    page = write_report(folder, out)
    if as_json:
        print_json({"page": str(page), "pictures": sorted(str(path) for path in page.parent.glob("*.png"))})
    else:
        results().print(f"{page}", markup=False)
    return 0


@looking_app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="run folders")],
    out: Annotated[Path | None, typer.Option(help="folder for a page with plots; pictures beside it")] = None,
    as_json: Json = False,
) -> int:
    """Show several runs side by side.

    The settings that differ, results, time and speed; with --out also as a page with plots.
    """
    from launch.compare import compare_runs, read_runs
    from launch.compare_tables import compare_parts
    from launch.tables import as_text

    start_logging()
    runs = read_runs(folders)
    found = compare_runs(runs)
    if out is not None:
        from launch.report.comparison import write_comparison

        page = write_comparison(runs, found, out)
        found |= {"page": str(page), "pictures": sorted(str(path) for path in page.parent.glob("*.png"))}
    if as_json:
        print_json(found)
    else:
        results().print(as_text(compare_parts(found)))
        if out is not None:
            results().print(found["page"], markup=False)
    return 0
