"""From the files of one source, in any form, to tables of rows: texts, judgements by split, given negatives.

Everything streams: what stays in memory are numbers, some forty bytes for each text and judgement. Records may stand beside
a collection: a passage of theirs that has the id of a document is that document.
"""

from pathlib import Path

import numpy as np

from trainer.data.collection import Collection
from trainer.data.examples import Examples
from trainer.data.forms import Source
from trainer.data.judged import SIDES, save_absent, save_given, save_own, sorted_judgements, write_about
from trainer.data.problems import Report
from trainer.data.texts import TextWriter


def build_source(source: Source, folder: Path, report: Report) -> None:
    """Write the tables of one source into a folder; every problem goes to `report`, and what is sound is written."""
    writers = {side: TextWriter(folder / f"{side}.arrow") for side in SIDES}
    collection = Collection(source, folder, report)
    examples = Examples(writers["queries"], writers["corpus"], report)
    for side, writer in writers.items():
        collection.add_texts(side, writer)
    examples.read(source)
    rows = {side: writer.settle(report, may_repeat=bool(source.records)) for side, writer in writers.items()}
    save_own(folder, writers["queries"].own_rows(writers["corpus"]))
    found = {split: [pairs.rows(rows["queries"], rows["corpus"])] for split, pairs in examples.positives.items()}
    negatives = [examples.negatives.rows(rows["queries"], rows["corpus"])]
    for split, judged in collection.judgements():
        found.setdefault(split, []).append(judged.known)
        negatives.append(judged.given)
        save_absent(folder, split, judged.absent)
    judgements = {split: sorted_judgements(np.concatenate(parts)) for split, parts in found.items()}
    for split, judged_rows in judgements.items():
        np.save(folder / f"qrels-{split}.npy", judged_rows, allow_pickle=False)
    examples.report_without_positive(rows["queries"], list(judgements.values()))
    save_given(folder, np.concatenate(negatives), list(judgements.values()), len(writers["queries"].given_id_keys))
    write_about(folder, examples.form or ("BEIR" if source.kind == "beir" else "records"))
