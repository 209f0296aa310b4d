"""What a mining service is told: the sections of a job file that the miner reads."""

from dataclasses import field
from typing import Annotated

from annotated_types import Ge, Interval
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from mining.audit import AuditSettings
from mining.clusters import ClusterSettings
from mining.filters import FilterSettings
from mining.index import IndexSettings
from mining.passages import Mode
from mining.rerank import RerankSettings
from mining.sampling import SampleSettings
from mining.search import SearchSettings
from trainer.encoder.shards import KEEP_ENCODINGS, EncodeSettings
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, Sources
from trainer.ranges import job_section

ALL_ENCODINGS = 1 << 30  # as mine.keep_encodings: embeddings that are not of this run alone, none of which is deleted


@job_section
class MineSettings:
    """Section `mine`: the service itself."""

    poll_s: PositiveFloat = 1.0
    """Seconds between two looks for a new checkpoint."""
    bm25_top_k: NonNegativeInt = 50
    """Candidates of version 0, which is there before any checkpoint; 0: no version 0."""
    keep_versions: PositiveInt = 3
    """Newest versions kept; pinned ones stay, and all while negatives.schedule is set."""
    memory_gib: PositiveFloat | None = None
    """GiB that a rank may take; None: half of what is free, shared by the machine's ranks."""
    passages: Mode = "fresh"
    """Whose embeddings of passages: each checkpoint's, the first one's, or earlier ones till they drift."""
    max_drift: Annotated[float, Interval(ge=0, le=2)] = 0.01
    """With passages = "drift": 1 - mean cosine to the earlier embeddings up to which they are kept."""
    keep_encodings: Annotated[int, Ge(2)] = KEEP_ENCODINGS
    """Sets of embeddings kept in shards/, youngest first; a refresh makes two, of queries and of passages."""


@job_section
class MineJob:
    """All that the miner is told."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sources: Sources = field(default_factory=dict)
    negatives: NegativesSettings = field(default_factory=NegativesSettings)
    mine: MineSettings = field(default_factory=MineSettings)
    encode: EncodeSettings = field(default_factory=EncodeSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    rerank: RerankSettings = field(default_factory=RerankSettings)
    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)

    def __post_init__(self) -> None:
        for name, depth in (("search.top_k", self.search.top_k), ("mine.bm25_top_k", self.mine.bm25_top_k)):
            if 0 < depth < self.sample.num_negatives:
                raise InputError(
                    f"sample.num_negatives={self.sample.num_negatives} is more than {name}={depth} candidates; set {name} higher"
                )
        if self.filter.range_min >= self.num_candidates:
            raise InputError(
                f"filter.range_min={self.filter.range_min} leaves none of search.top_k={self.search.top_k} candidates"
            )
        if self.negatives.schedule and self.mine.bm25_top_k == 0:
            raise InputError("negatives.schedule begins with version 0 from BM25, but mine.bm25_top_k=0; set it to 50")

    @property
    def num_candidates(self) -> int:
        """How many candidates a query has at most."""
        from_last = self.sample.num_negatives if self.sample.replace == "easy" else 0
        return self.search.top_k + self.search.bm25_top_k + from_last
