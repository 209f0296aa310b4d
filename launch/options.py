"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="job file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="a setting; sections below")]
Model = Annotated[str, typer.Argument(help="model folder, run folder, hub name or package")]
Data = Annotated[Path, typer.Argument(help="data set: BEIR folder, record files, saved data set or name of the hub")]
Rounds = Annotated[int, typer.Option(min=1, help="turns of everybody; medians are shown")]
Peer = Annotated[bool, typer.Option(help="measure sentence-transformers, too")]
Out = Annotated[Path | None, typer.Option(help="folder for a report: JSON, Markdown and a picture")]
AllowChange = Annotated[bool, typer.Option("--allow-change", help="go on in a run's folder with another job")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]


class JobCommand(TyperCommand):
    """A command that takes a job: its help ends with the sections of job files, by their own descriptions."""

    def format_help(self, ctx, formatter) -> None:
        """Print the help, and the sections as soon as the modules that hold them are imported, which takes seconds."""
        super().format_help(ctx, formatter)
        from launch.output import results
        from launch.settings import section_parts
        from launch.tables import as_text

        results().print(as_text(section_parts()))
