"""How long the texts of a plan are, and how many there are: of the job's data where it can be opened, else what a person says."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.jobfile import Jobs
from trainer.encoder.settings import Traits
from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedTexts:
    """Numbers of the data. Where a count is None nothing is said of what depends on it."""

    query_lengths: np.ndarray  # tokens of a sample
    passage_lengths: np.ndarray
    longest: int  # of a text, in tokens
    num_queries: int | None  # of the training split
    num_passages: int | None
    source: str

    @property
    def query_tokens(self) -> float:
        """Tokens of a query, in the mean."""
        return float(self.query_lengths.mean())

    @property
    def passage_tokens(self) -> float:
        """Tokens of a passage, in the mean."""
        return float(self.passage_lengths.mean())

    def lengths(self, num_queries: int, num_passages: int) -> np.ndarray:
        """Return the tokens of so many queries, then of so many passages: the sample, as often as it takes."""
        return np.concatenate([np.resize(self.query_lengths, num_queries), np.resize(self.passage_lengths, num_passages)])

    def as_json(self) -> dict[str, Any]:
        """Return the texts without the sample."""
        numbers = {"query_tokens": self.query_tokens, "passage_tokens": self.passage_tokens, "longest": self.longest}
        return numbers | {"num_queries": self.num_queries, "num_passages": self.num_passages, "source": self.source}


@dataclass(frozen=True, kw_only=True)
class SaidTexts:
    """What the command line says of the data; None: nothing."""

    query_tokens: float | None = None
    passage_tokens: float | None = None
    num_queries: int | None = None
    num_passages: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for lengths that no text has."""
        for option, tokens in (("--query-tokens", self.query_tokens), ("--passage-tokens", self.passage_tokens)):
            if tokens is not None and not 1 <= tokens < 2**20:
                raise InputError(f"{option} {tokens:g} is no length of a text; expected 1 token or more")


def planned_texts(jobs: Jobs, traits: Traits, said: SaidTexts) -> PlannedTexts:
    """Return the texts of a job: what is said, else what its data hold, else the most that the job lets through."""
    needs_data = any(value is None for value in vars(said).values())
    found = (_of_data(jobs) if needs_data else None) or _longest(traits)
    if said.query_tokens is not None and said.passage_tokens is not None:
        found = replace(found, source="as --query-tokens and --passage-tokens say")
    if said.query_tokens is not None:
        found = replace(found, query_lengths=np.array([said.query_tokens]))
    if said.passage_tokens is not None:
        found = replace(found, passage_lengths=np.array([said.passage_tokens]))
    longest = max(found.longest, int(found.query_lengths.max()), int(found.passage_lengths.max()))
    counts = {name: getattr(said, name) for name in ("num_queries", "num_passages") if getattr(said, name) is not None}
    return replace(found, longest=longest, **counts)


def _longest(traits: Traits) -> PlannedTexts:
    return PlannedTexts(
        query_lengths=np.array([traits.max_query_tokens]),
        passage_lengths=np.array([traits.max_passage_tokens]),
        longest=max(traits.max_query_tokens, traits.max_passage_tokens),
        num_queries=None,
        num_passages=None,
        source="as long as the job lets them be, because its data are not here; --query-tokens and --passage-tokens say more",
    )


def _of_data(jobs: Jobs) -> PlannedTexts | None:
    """Return what the job's data say; None where they, or the model's tokenizer, are not on this machine."""
    from launch.foresee import token_lengths
    from trainer.data.datasets import open_data
    from trainer.encoder.model import load_text_rules

    train = jobs.train
    places = [source.path for source in train.sources.values()] or [train.data.path]
    if not all(Path(place).expanduser().exists() for place in places):
        return None
    try:
        tokenizer, traits = load_text_rules(train.model)
    except InputError:
        return None
    data = open_data(train.data, train.sources)
    queries = token_lengths(data.queries, tokenizer, traits.query_prefix, traits.max_query_tokens)
    passages = token_lengths(data.corpus, tokenizer, traits.passage_prefix, traits.max_passage_tokens)
    return PlannedTexts(
        query_lengths=queries,
        passage_lengths=passages,
        longest=int(max(queries.max(), passages.max())),
        num_queries=len(data.training_queries(train.data.train_split)),
        num_passages=len(data.corpus),
        source=f"as a sample of {data.path} has them",
    )
