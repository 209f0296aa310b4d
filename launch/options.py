"""Arguments and options that several commands have.

Short options of settings are written down once, in SHORT, and end as overrides: what a job file says of a model, of data or of
encoding, every command that reads a model takes, by the same names and the same checks.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from trainer.errors import InputError

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="job file")]


class Asked(NamedTuple):
    """What is to be made of mined negatives: a file in a form, and a query that is shown."""

    out: Path | None = None
    form: str = "ids"
    scores: bool = False
    show: str | None = None


def setting_argument(help: str, *sections: str, metavar: str = "[section.key=value]...") -> Any:
    """Return an argument of settings that a shell completes; sections: that it takes, all where none is named."""

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        from launch.completion import offers

        given = ctx.params.get("overrides") or ctx.params.get("words") or []
        return offers(incomplete, [str(word) for word in given], sections)

    return typer.Argument(metavar=metavar, help=help, autocompletion=complete)


Overrides = Annotated[list[str] | None, setting_argument("settings; their sections are below")]
Settings = Annotated[
    list[str] | None,
    setting_argument("settings of model, data or encode; see negpool settings SECTION", "model", "data", "encode"),
]
OfData = Annotated[
    list[str] | None, setting_argument("settings of data; see negpool settings data", "data", metavar="[data.key=value]...")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder, run folder, hub name or package")]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="folder in BEIR's form, record files, saved data set or hub name")]
Rounds = Annotated[int, typer.Option(min=1, help="turns of everybody; medians are shown")]
Peer = Annotated[bool, typer.Option(help="measure sentence-transformers, too")]
Out = Annotated[Path | None, typer.Option(help="folder for a report: JSON, Markdown and a picture")]
AllowChange = Annotated[bool, typer.Option("--allow-change", help="go on in a run's folder with another job")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]


class Short(NamedTuple):
    """A setting's short option."""

    setting: str
    kind: type
    help: str
    metavar: str | None = None
    panel: str | None = "How a model reads and encodes (default: as its folder says)"
    as_value: Callable[[Any], str] = lambda value: quoted(value) if isinstance(value, str) else str(value)

    @property
    def parameter(self) -> Any:
        option = typer.Option(help=self.help, metavar=self.metavar, rich_help_panel=self.panel, show_default=False)
        return Annotated[self.kind | None, option]


def _columns(given: str) -> str:
    """Return `query=question,positive=answer` as the setting data.columns has it."""
    pairs = [pair.partition("=") for pair in given.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise InputError(
            f"--columns {given!r} does not name columns; expected query=question,positive=answer: our names, the file's"
        )
    return "{" + ", ".join(f"{quoted(name.strip())} = {quoted(column.strip())}" for name, _, column in pairs) + "}"


def _number_or_word(given: str) -> str:
    """Return what a setting has that takes a number or a word, such as "off"."""
    try:
        return repr(float(given))
    except ValueError:
        return quoted(given)


def _of_mining(setting: str, kind: type, help: str, metavar: str | None = None, as_value: Any = None) -> Short:
    more = {} if as_value is None else {"as_value": as_value}
    return Short(setting, kind, help, metavar, "Which negatives (more of it: sections search, filter, sample, rerank)", **more)


def quoted(text: str) -> str:
    """Return a text as TOML quotes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


COLUMNS = {
    "columns": Short(
        "data.columns",
        str,
        "columns of the files, as in query=question,positive=answer",
        "OURS=THEIRS,…",
        None,
        _columns,
    )
}
SHORT = COLUMNS | {
    "query_prefix": Short("model.query_prefix", str, "text before every query"),
    "passage_prefix": Short("model.passage_prefix", str, "text before every passage"),
    "max_query_tokens": Short("model.max_query_tokens", int, "tokens of a query, special ones included"),
    "max_passage_tokens": Short("model.max_passage_tokens", int, "tokens of a passage"),
    "width": Short("model.width", int, "keep the first so many numbers of an embedding"),
    "pooling": Short("model.pooling", str, "what becomes of a text's tokens", "mean|cls|…"),
    "precision": Short("encode.dtype", str, "of the products (default: what suits the device)", "fp32|bf16|fp16"),
    "device": Short("encode.device", str, "default: a GPU where there is one", "cpu|cuda|cuda:N"),
}
MINING = {
    "num_negatives": _of_mining("sample.num_negatives", int, "of each query (default: 16, of a small corpus fewer)"),
    "range_min": _of_mining("filter.range_min", int, "pass over the nearest so many passages (default: 0)"),
    "range_max": _of_mining("filter.range_max", int, "take none beyond the so many nearest (default: what suits the corpus)"),
    "relative_margin": _of_mining(
        "filter.relative_margin",
        str,
        "drop what scores above p - X * |p|, p the positive's score (default: 0.05)",
        "X|off",
        _number_or_word,
    ),
    "absolute_margin": _of_mining("filter.absolute_margin", str, "drop what scores above p - X", "X|off", _number_or_word),
    "max_score": _of_mining("filter.max_score", str, "drop what scores X or more", "X|off", _number_or_word),
    "min_score": _of_mining("filter.min_score", str, "drop what scores less than X", "X|off", _number_or_word),
    "positive": _of_mining("filter.positive", str, "whose score is p, of several (default: lowest)", "lowest|best|each"),
    "method": _of_mining("sample.method", str, "which of those left are taken (default: uniform)", "top|uniform|…"),
    "cross_encoder": _of_mining("rerank.model", str, "scores query and passage together: folder or hub name", "MODEL"),
    "cross_encoder_margin": _of_mining(
        "rerank.margin", str, "drop what it scores above its score of the positive - X", "X|off", _number_or_word
    ),
}


def with_short(options: dict[str, Short]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return what gives a command the options in the place of its parameter `short`, which gets what was given as overrides."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**given: Any) -> int:
            chosen = {name: value for name in options if (value := given.pop(name)) is not None}
            _refuse_twice({option_of(name): options[name].setting for name in chosen}, given)
            return command(**given, short=[f"{options[name].setting}={options[name].as_value(chosen[name])}" for name in chosen])

        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            added = [parameter.replace(name=name, annotation=each.parameter) for name, each in options.items()]
            parameters += [parameter] if parameter.name != "short" else [each.replace(default=None) for each in added]
        run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
        return run

    return decorate


def option_of(name: str) -> str:
    """Return how a short option is typed."""
    return f"--{name.replace('_', '-')}"


def _refuse_twice(chosen: dict[str, str], given: dict[str, Any]) -> None:
    """Raise InputError where an option and a word of the command line are about one setting. chosen: settings by option."""
    typed = {word.partition("=")[0] for word in given.get("overrides") or given.get("words") or []}
    for option, setting in chosen.items():
        if setting in typed:
            raise InputError(f"{option} is the setting {setting}, which is given as well; leave one of them out")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a question, and those that are a setting: section.key=value of a section that jobs have."""
    from launch.jobfile import SECTIONS

    setting = re.compile(rf"({'|'.join(SECTIONS)})(\.\w+)+=.*", re.DOTALL)
    settings = [word for word in words if setting.fullmatch(word)]
    return [word for word in words if word not in settings], settings


class JobCommand(TyperCommand):
    """A command that takes a job: its help ends with the sections of job files, by their own descriptions."""

    def format_help(self, ctx, formatter) -> None:
        """Print the help, and the sections as soon as the modules that hold them are imported, which takes seconds."""
        super().format_help(ctx, formatter)
        from launch.output import results
        from launch.settings import section_text

        results().print(section_text())
