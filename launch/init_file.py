"""The text of the job file that `negpool init` writes: settings with their reasons, and what to change next."""

import shlex
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tomli_w

COLUMN = 34  # where comments begin, as far as settings are short enough


class Line(NamedTuple):
    """A setting and why it has its value."""

    section: str
    key: str
    value: Any
    why: str


class About(Protocol):
    """What the head of the file says of the machine."""

    @property
    def cores(self) -> int: ...
    @property
    def num_gpus(self) -> int: ...


NEXT = (
    "What to change next, one thing at a time; negpool compare RUN RUN shows what it brought:",
    "- batch.queries higher: more negatives for each query; memory does not grow, a step takes longer.",
    "- negatives.per_query 2 to 7, and filter.relative_margin, if good passages are among the negatives:",
    "  negpool mine THIS_FILE --show QUERY_ID shows them; the text of a query does, too.",
    "- optim.lr half and double, then optim.epochs; model.max_passage_tokens higher, if the end of texts matters.",
    "- model.query_prefix and model.passage_prefix, if the model was trained with some: see its card.",
    "- negpool settings SECTION lists everything else.",
)


def job_text(about: About, out: Path, lines: list[Line]) -> str:
    """Return the file: how to run it, the sections, what to change next."""
    machine = f"{about.num_gpus} GPU{'s' * (about.num_gpus != 1)}" if about.num_gpus else f"{about.cores} cores, no GPU"
    name = shlex.quote(str(out))
    text = [
        f"# negpool run {name} --dry-run    # what it would do, and how long it takes",
        f"# negpool run {name}",
        f"# Chosen by negpool init for this data set and {machine}.",
    ]
    for section, settings in groupby(lines, key=lambda line: line.section):
        text += ["", f"[{section}]", *(_shown(line) for line in settings)]
    return "\n".join([*text, "", *(f"# {line}" for line in NEXT)]).replace("THIS_FILE", name) + "\n"


def _shown(line: Line) -> str:
    setting = f"{line.key} = {_inline(line.value)}"
    return f"{setting:<{COLUMN}} # {line.why}"


def _inline(value: Any) -> str:
    """Return a value as TOML has it, on one line."""
    if isinstance(value, dict):
        pairs = (f"{tomli_w.dumps({key: item}).strip()}" for key, item in value.items())
        return "{ " + ", ".join(pairs) + " }"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
