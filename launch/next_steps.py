"""What a person may do with a run that has ended: the model's folder, and a search that means something in their data."""

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path

from trainer.data.code_search import is_function_id
from trainer.data.datasets import RetrievalData
from trainer.data.forms import NO_COLUMNS

LONGEST_EXAMPLE = 60  # characters of a query that stands in a command
LOOKED_AT = 50  # queries, of which the first short one is taken


def next_steps(
    run: Path, model: Path, data: RetrievalData, split: str, columns: Mapping[str, str] = NO_COLUMNS
) -> list[tuple[str, str]]:
    """Return what each step is for, and its folder or command.

    split: whose queries make the example. columns: by which the first data set is read, where they are not ours.
    """
    folder, path = shlex.quote(str(run)), shlex.quote(str(next((s.settings.path for s in data.sources), data.path)))
    if columns:
        path += f" --columns {shlex.quote(','.join(f'{ours}={theirs}' for ours, theirs in columns.items()))}"
    steps = [("The model", f"{model}   (SentenceTransformer and AutoModel load it)")]
    if holds_functions(data):
        steps.append(("Search", f'negpool search {folder} {path} "read a file as lines"'))
        steps.append(("Your own code", "negpool data code --source DIR --out data/mine"))
        return [*steps, ("", "negpool init data/mine")]
    steps.append(("Search", f"negpool search {folder} {path} {shlex.quote(example_query(data, split))}"))
    return [*steps, ("Its page", f"negpool report {folder}")]


def holds_functions(data: RetrievalData) -> bool:
    """Tell whether the passages are what `negpool data code` writes."""
    return all(is_function_id(name) for name in data.corpus[:LOOKED_AT]["_id"])


def example_query(data: RetrievalData, split: str) -> str:
    """Return a short query of a split, or the beginning of one."""
    rows = data.evaluated_queries(split)[:LOOKED_AT] if split in data.qrels else range(min(LOOKED_AT, len(data.queries)))
    texts = [" ".join(text.split()) for text in data.queries[rows]["text"]]
    short = (text for text in texts if 0 < len(text) <= LONGEST_EXAMPLE)
    return next(short, textwrap.shorten(texts[0], LONGEST_EXAMPLE, placeholder="")) if texts else ""
