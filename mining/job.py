"""What a mining service is told: the sections of a job file that the miner reads."""

from dataclasses import field

from mining.settings import (
    SPARE_RANDOM,
    AuditSettings,
    ClusterSettings,
    FilterSettings,
    IndexSettings,
    MineSettings,
    RerankSettings,
    SampleSettings,
    SearchSettings,
)
from trainer.encoder.settings import EncodeSettings
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, Sources
from trainer.ranges import job_section

ALL_ENCODINGS = 1 << 30  # as mine.keep_encodings: embeddings that are not of this run alone, none of which is deleted


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

    def num_known(self, num_queries: int, num_positives: int) -> int:
        """Return how many pairs are scored as their shard passes: positives, and candidates that other ways have found."""
        random = self.sample.num_random and self.sample.num_random + SPARE_RANDOM
        return num_positives + num_queries * (self.num_candidates - self.search.top_k + random)
