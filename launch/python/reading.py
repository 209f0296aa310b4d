"""`negpool.evaluate`, `encode` and `load`: models that are there, read by the same code as the commands read them.

All of it is done in the caller's process, which keeps its environment, its logging and its process group.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from launch.output import keep_output_clean
from launch.python.in_memory import Data, Model, data_path, model_folder
from launch.python.keywords import reading_overrides
from launch.python.whole_job import cache_of
from trainer.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from launch.named import Reading


def evaluate(model: Model, data: Data, *, split: str = "test", **settings: object) -> dict[str, float]:
    """Return nDCG@10, MRR@10 and recall of a model, or of "bm25", on a split of a data set.

    settings: of model, data and encode, as in a job, or as the commands' options: query_prefix, max_query_tokens, pooling, …
    """
    from launch.models import evaluate_bm25, evaluate_model, refuse_encoding
    from launch.named import BM25, read_settings
    from trainer.encoder.device import choose_device
    from trainer.world import stay_alone

    overrides = reading_overrides(settings)
    reading = read_settings(overrides, Path(data_path(data, split, cache_of(settings))))
    if model == BM25:
        refuse_encoding(reading)
        return evaluate_bm25(reading.open_data(), split)
    with named(model) as name:
        measures = evaluate_model(name, reading, split, lambda reading: stay_alone(choose_device(reading.encode.device)))
    assert measures is not None  # who is alone speaks
    return measures


def encode(
    model: Model, texts: Sequence[str], *, side: Literal["query", "passage"] = "passage", **settings: object
) -> npt.NDArray[np.float32]:
    """Return the embeddings of texts in their order, (N, D) float32.

    side: whose prefix, length and tower the model reads them with. settings: as `evaluate` takes them.
    Each call reads the model anew; who encodes often loads it once, with `load`.
    """
    from launch.named import as_it_is, read_settings

    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("texts holds something that is no text; expected a list of texts")
    if side not in ("query", "passage"):
        raise InputError(f'side={side!r} is unknown; expected "query" or "passage"')
    reading = read_settings(reading_overrides(settings))
    with named(model) as name:
        return _encoded(as_it_is(reading.model, _folder(name)), list(texts), side, reading)


def _encoded(model: Any, texts: list[str], side: Literal["query", "passage"], reading: "Reading") -> npt.NDArray[np.float32]:
    import datasets

    from trainer.encoder.auto import encode_on
    from trainer.encoder.device import choose_device
    from trainer.encoder.encode import DTYPES, encode_rows
    from trainer.encoder.model import load_encoder
    from trainer.encoder.tokens import tokenize_texts

    encoder, tokenizer, traits = load_encoder(model)
    if not texts:
        return np.zeros((0, encoder.width), np.float32)
    device = choose_device(reading.encode.device)
    encoder.to(device)
    table = datasets.Dataset.from_dict({"text": texts})
    with tempfile.TemporaryDirectory() as cache:  # texts that come once are not kept
        tokens = tokenize_texts(table, side, tokenizer, traits, Path(cache))
        dtype = DTYPES[encode_on(reading.encode, device).dtype]
        return encode_rows(encoder.side(side), tokens, np.arange(len(texts)), dtype=dtype)


def load(model: Model, *, device: str | None = None) -> "SentenceTransformer":
    """Return the model of a run folder, a checkpoint, a model folder or a name as a SentenceTransformer."""
    from trainer.encoder.source import resolve_model

    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "sentence-transformers is not installed; run ./launch/install.sh .venv notebook, or pip install sentence-transformers"
        ) from error
    if isinstance(model, SentenceTransformer):
        return model
    return SentenceTransformer(resolve_model(_folder(str(model))), device=device)


def _folder(name: str) -> str:
    """Return the folder or the name of a model; raises InputError for "bm25", which encodes nothing."""
    from launch.named import BM25
    from launch.named import model_folder as folder_of

    if name == BM25:
        raise InputError('"bm25" compares words and encodes nothing; negpool.evaluate and mine_negatives take it')
    return folder_of(name)


@contextlib.contextmanager
def named(model: Model) -> Iterator[str]:
    """Yield the name or the folder of a model; a SentenceTransformer is saved for as long as the block lasts."""
    keep_output_clean()
    with tempfile.TemporaryDirectory() as root:
        yield model_folder(model, Path(root))
