"""From the files of one source, in any form, to tables of rows: texts, judgements by split, given negatives.

Everything streams: what stays in memory are numbers, some forty bytes for each text and judgement.
"""

from pathlib import Path

from trainer.data.collection import build_collection
from trainer.data.examples import Examples
from trainer.data.forms import Source
from trainer.data.problems import Report


def build_source(source: Source, folder: Path, report: Report) -> None:
    """Write the tables of one source into a folder; every problem goes to `report`, and what is sound is written."""
    if source.kind == "beir":
        build_collection(source, folder, report)
    else:
        Examples(folder, report).build(source)
