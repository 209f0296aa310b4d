"""What `negpool search` found, for a person: title or first line, score, name, and the lines that follow.

Prose is wrapped between words; code, which the data set of `negpool data code` holds, keeps its lines.
"""

import re
import textwrap
from typing import Any

from rich.text import Text

from trainer.data.code_search import is_function_id

SHOWN_LINES, INDENT = 3, " " * 12  # below the first; as wide as the number and the score before it
MADE_ID = re.compile("[0-9a-f]{32}")  # of a text that has none in its file: it says nothing to a person


def hits_text(found: dict[str, Any], width: int) -> Text:
    """Return the query, where it is one of the data set, and its passages, best first, on lines of a width at most."""
    asked = [Text(line, style="bold") for line in textwrap.wrap(found["query"], width)] if "query_id" in found else []
    lines = [*asked, *([Text("")] if asked else [])]
    for rank, hit in enumerate(found["results"], 1):
        title, *body = _lines(hit, width - len(INDENT))
        lines.append(Text.assemble(f"{rank:>2}.  ", (f"{hit['score']:>6.3f}", "dim"), "  ", (title, "bold")))
        if not MADE_ID.fullmatch(hit["id"]):
            lines.append(Text.assemble(INDENT, (hit["id"], "cyan")))
        lines += [*(Text(INDENT + line, style="dim") for line in body[:SHOWN_LINES]), Text("")]
    return Text("\n").join(lines[:-1])


def _lines(hit: dict[str, Any], width: int) -> list[str]:
    """Return the title, where there is one, and the text behind it, on lines of a width."""
    title, text = hit["title"], hit["excerpt"]
    if is_function_id(hit["id"]):
        return [line if len(line) <= width else line[: width - 1] + "…" for line in text.split("\n")]
    rest = text.removeprefix(title).strip() if title else text
    head = [textwrap.shorten(title, width, placeholder=" …")] if title else []
    return [*head, *textwrap.wrap(rest, width, max_lines=SHOWN_LINES + 1 - len(head), placeholder=" …")] or [""]
