"""Results as text and as a notebook shows them: the same tables that the commands print."""

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType

WIDTH = 100
HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


def as_text(parts: Sequence[RenderableType]) -> str:
    """Return what the parts look like in a plain terminal."""
    return _drawn(parts).export_text().rstrip()


def as_html(parts: Sequence[RenderableType]) -> str:
    """Return the same for a notebook."""
    return _drawn(parts).export_html(inline_styles=True, code_format=HTML)


def _drawn(parts: Sequence[RenderableType]) -> Console:
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False, highlight=False)
    for part in parts:
        console.print(part, markup=False)
    return console
