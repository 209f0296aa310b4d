"""`negpool.mine_negatives`: hard negatives from any model, as a table, without a run."""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import RenderableType

from launch.early import check_early
from launch.options import MINING, SHORT
from launch.python.in_memory import Data, Model, data_path
from launch.python.keywords import reading_overrides
from launch.python.reading import named
from launch.python.rendered import as_html, as_text
from launch.python.whole_job import cache_of
from trainer.errors import InputError
from trainer.interrupt import handlers_kept

if TYPE_CHECKING:
    import datasets

Form = Literal["sentence-transformers", "triplet", "labeled-pair", "labeled-list", "tevatron", "flagembedding", "ids"]
SHOWN = 3  # rows


@dataclass(frozen=True, repr=False)
class MinedNegatives:
    """A query with its positive and its mined negatives in each row."""

    form: Form
    rows: "datasets.Dataset"
    """Rows by number, columns by name; as a list of dictionaries: rows.to_list()."""
    counts: dict[str, int]
    """Candidates, and how many of them each filter dropped."""
    notes: tuple[str, ...]
    """What the form has no place for."""

    def to_dataset(self) -> "datasets.Dataset":
        """Return the rows as a trainer takes them."""
        return self.rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __repr__(self) -> str:
        """Return how many there are, what was dropped, and the first rows."""
        return as_text(list(self._parts()))

    def _repr_html_(self) -> str:
        return as_html(list(self._parts()))

    def _parts(self) -> Iterator[RenderableType]:
        yield f"{len(self):,} rows, form {self.form}: {', '.join(self.rows.column_names)}"
        yield ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.counts.items())
        yield from self.notes
        for row in self.rows.select(range(min(SHOWN, len(self)))):
            yield "\n".join(["", *(f"{name}: {value}"[:100] for name, value in row.items())])


def mine_negatives(
    model: Model,
    data: Data,
    *,
    form: Form = "sentence-transformers",
    scores: bool = False,
    **settings: object,
) -> MinedNegatives:
    """Return hard negatives for the training queries of a data set.

    model: a name, a folder, a SentenceTransformer, "bm25", or a folder with queries.npy and passages.npy.
    form: the columns of a row. scores: those of the model, too, where a form has a place for them.
    settings: as the options of `negpool mine`: num_negatives, range_min, range_max, relative_margin, absolute_margin, max_score,
    min_score, positive, method, cross_encoder (or a CrossEncoder), cross_encoder_margin, query_prefix, …; and of model, data,
    search, filter, sample and so on, as in a job.
    Raises KeyboardInterrupt where it is stopped, InputError where nothing can come of it.
    """
    from launch.mine import Stopped, mined_offline, read_to_mine
    from mining.alone import Alone
    from mining.export import FORMS, write_negatives

    if form not in FORMS:
        raise InputError(f"form={form!r} is unknown; expected one of {', '.join(FORMS)}")
    split = str(settings.get("data.train_split", "train"))
    with named(model) as name, handlers_kept(), tempfile.TemporaryDirectory() as folder:
        overrides = reading_overrides(_with_saved(settings, Path(folder)), SHORT | MINING)
        jobs = read_to_mine(None, [*overrides, ("data.path", data_path(data, split, cache_of(settings)))])
        check_early(jobs, trains=False)
        try:
            with mined_offline(jobs, name, Alone()) as mined:
                assert mined is not None  # who is alone speaks
                out = Path(folder) / "mined.parquet"
                written = write_negatives(out, form, mined.data, mined.judgements, mined.negatives, scores)
        except Stopped:
            raise KeyboardInterrupt("mining was stopped; what was encoded stays, and the same call goes on from there") from None
        manifest = mined.negatives.manifest
        counts = {"candidates": manifest["counts"]["candidates"], **manifest["filter"]["dropped"]}
        return MinedNegatives(form, _read(out), counts, tuple(written["said"]))


def _with_saved(settings: dict[str, object], folder: Path) -> dict[str, object]:
    """Return the settings with a folder in the place of a CrossEncoder of sentence-transformers."""
    peers, given = sys.modules.get("sentence_transformers"), settings.get("cross_encoder")
    if peers is None or not isinstance(given, peers.CrossEncoder):
        return settings
    given.save_pretrained(str(folder / "cross-encoder"))
    return settings | {"cross_encoder": str(folder / "cross-encoder")}


def _read(path: Path) -> Any:
    """Return a file's rows in memory: the file is deleted."""
    import datasets
    import pyarrow.parquet as pq

    return datasets.Dataset(pq.read_table(path))
