"""The sections of a job that only the miner reads.

They stand apart from what they steer, so that a job is read and refused before torch and FAISS are imported.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.encoder.settings import KEEP_ENCODINGS
from trainer.errors import InputError
from trainer.handoff.settings import Which
from trainer.ranges import AUTO as AUTO
from trainer.ranges import Share, job_section

KNOWN = ("judged", "equal_texts", "duplicates")  # filters that drop for what is known of a candidate, not for a guess
SPARE_RANDOM = 2  # random passages of a query beyond those it needs, for one that is its positive
EXACT = "exact"  # as index.factory, beside AUTO and FAISS's own strings
Passages = Literal["fresh", "frozen", "drift"]


@job_section
class MineSettings:
    """Section `mine`: the mining service itself."""

    poll_s: PositiveFloat = 1.0
    """Seconds between two looks for a new checkpoint."""
    bm25_top_k: NonNegativeInt = 50
    """Candidates of version 0, which is there before any checkpoint; 0: no version 0."""
    bm25_minutes: PositiveFloat = 30.0
    """Minutes that BM25 may take, by a plan measured on a sample. Beyond them version 0 is left out, aloud, but with
    negatives.schedule, and search.bm25_top_k is refused.
    """
    keep_versions: PositiveInt = 3
    """Newest versions kept; pinned ones stay, and all while negatives.schedule is set."""
    memory_gib: PositiveFloat | None = None
    """GiB that a rank may take; None: half of what is free, shared by the machine's ranks."""
    passages: Passages = "fresh"
    """Whose embeddings of passages: each checkpoint's, the first one's, or earlier ones till they drift."""
    max_drift: Annotated[float, Interval(ge=0, le=2)] = 0.01
    """With passages = "drift": 1 - mean cosine to the earlier embeddings up to which they are kept."""
    keep_encodings: Annotated[int, Ge(2)] = KEEP_ENCODINGS
    """Sets of embeddings kept in shards/, youngest first; a refresh makes two, of queries and of passages."""


@job_section
class IndexSettings:
    """Section `index`: what finds the nearest passages."""

    factory: str = EXACT
    """Either "exact", "auto", or a FAISS factory string for one index over the whole corpus: "IVF1024,Flat", "IVF1024,SQ8",
    "IVF1024,PQ64", with "OPQ64," or "PCA128," before them, …; "auto": exact search or lists, whichever is measured to be cheaper.
    """
    nprobe: PositiveInt = 4
    """Lists that a query looks into at first: the audit doubles them until audit.min_recall holds."""


@job_section
class SearchSettings:
    """Section `search`: how many candidates a query gets."""

    top_k: PositiveInt = 200
    """Candidates of each query (ANCE: 200)."""
    bm25_top_k: NonNegativeInt = 0
    """Candidates that BM25 adds to these; the encoder scores them, too."""


@job_section
class FilterSettings:
    """Section `filter`: which candidates may become negatives.

    Judged positives, of any split, and documents with the query's own id are always dropped.
    """

    equal_texts: bool = True
    """Drop texts equal to a positive or to the query itself."""
    duplicates: bool = True
    """Of several candidates with one text keep the first."""
    range_min: NonNegativeInt = 0
    """The first place that is kept among the candidates left by the filters above, from 0: NV-Retriever begins at 10; with
    range_max a band (SciNCL).
    """
    range_max: PositiveInt | Literal["off"] = "off"
    """The first place that is too far."""
    max_score: float | Literal["off"] = "off"
    """Keep s < max_score (NV-Retriever's TopK-Abs, 0.7)."""
    min_score: float | Literal["off"] = "off"
    """Keep s >= min_score."""
    positive: Which = "lowest"
    """Which of several positives decides, of which training draws one; s_pos below is its score, c_pos of rerank.margin the
    cross-encoder's: the lowest; the best, which lets negatives pass that score above another positive; or each: a candidate
    stays that keeps all margins to one of them, and the trainer leaves it out where it draws another (samplers go by the best).
    """
    relative_margin: NonNegativeFloat | Literal["off"] = 0.05
    """Keep s < s_pos - |s_pos| * margin (NV-Retriever's TopK-PercPos, sign-safe)."""
    absolute_margin: float | Literal["off"] = "off"
    """Keep s < s_pos - margin (NV-Retriever's TopK-MarginPos); a negative one lets scores up to so much above pass (UniME, -0.1).
    """
    adaptive_margin: tuple[NonNegativeFloat, NonNegativeFloat] | Literal["off"] = "off"
    """With [m, n] keep s < s_pos - (m + n * |s_pos|), a margin that follows the positive's score (the idea of LG-ANNA)."""
    when_empty: Literal["random", "lowest", "none"] = "random"
    """What a query gets of which nothing passed: passages drawn from the whole corpus, its candidates of the lowest scores
    whatever their rank, or nothing, and the trainer has in-batch negatives only. The rules on scores hold for all of them: a
    place stays empty rather than break one.
    """

    def __post_init__(self) -> None:
        if self.range_max != "off" and self.range_max <= self.range_min:
            raise InputError(f"filter.range_max={self.range_max} must be more than filter.range_min={self.range_min}")
        if self.max_score != "off" and self.min_score != "off" and not self.min_score < self.max_score:
            raise InputError(f"filter.min_score={self.min_score} must be less than filter.max_score={self.max_score}")


@job_section
class SampleSettings:
    """Section `sample`: which of the candidates that passed the filters become negatives."""

    method: Literal["uniform", "top", "top1", "simans", "simans_laplace", "softmax"] = "uniform"
    """Which of the candidates that passed: any (ANCE), the best, the best one and any of the others (NV-Retriever, with
    pool = 10), those that score near the positive (SimANS, in two forms), or by a softmax of the scores.
    """
    num_negatives: PositiveInt = 16
    """Negatives of each query; fewer where fewer passed."""
    pool: PositiveInt | Literal["all"] = "all"
    """The best so many that passed are drawn from."""
    simans_a: NonNegativeFloat = 200.0
    """SimANS: p ~ exp(-a (s - s_pos - b)^2), s_pos of the positive that filter.positive names, of "each" the best. The paper's
    a = 0.5 is for raw dot products of some tens; on unit vectors, whose loss divides scores by 0.05, the same curve has
    a = 0.5 / 0.05^2.
    """
    simans_b: float = 0.0
    """The b of both forms of SimANS."""
    laplace_a: NonNegativeFloat = 60.0
    """The other form of SimANS: p ~ exp(-a |s - s_pos - b|); a = 3 on raw dot products, 3 / 0.05 on unit vectors."""
    softmax_temperature: PositiveFloat = 0.05
    """The softmax: p ~ exp(s / temperature)."""
    random_share: Share = 0.0
    """Share of the negatives that is drawn from the whole corpus instead (STAR)."""
    replace: Literal["all", "easy"] = "all"
    """With "easy" a negative of the last version stays unless its score has fallen: easy_ratio * now < at first, and
    |now| < easy_below (Conan).
    """
    easy_ratio: PositiveFloat = 1.15
    """See replace."""
    easy_below: float = 0.8
    """See replace."""

    @property
    def num_random(self) -> int:
        """How many of a query's negatives come from the whole corpus."""
        return round(self.random_share * self.num_negatives)


@job_section
class RerankSettings:
    """Section `rerank`: a cross-encoder that scores the candidates and the positives."""

    model: str = ""
    """Folder or hub name of any AutoModelForSequenceClassification; empty: none."""
    top_k: PositiveInt = 50
    """Of the candidates that passed the filters, the best so many are scored; the others are dropped."""
    max_tokens: Annotated[int, Ge(8)] = 512
    """Tokens of query and passage together; the longer of both is cut."""
    margin: float | Literal["off"] = "off"
    """Keep c < c_pos - margin, c_pos the cross-encoder's score of the positive that filter.positive names (in logits)."""
    max_score: float | Literal["off"] = "off"
    """Keep c < max_score (in logits)."""

    def __post_init__(self) -> None:
        for name in ("margin", "max_score"):
            if getattr(self, name) != "off" and not self.model:
                raise InputError(f"rerank.{name}={getattr(self, name)} needs a cross-encoder; set rerank.model to one")


@job_section
class ClusterSettings:
    """Section `clusters`: clusters of training queries, published with a version, for `batch` to draw from."""

    num: NonNegativeInt = 0
    """Clusters; 0: none."""
    of: Literal["queries", "passages"] = "queries"
    """What is clustered; with "passages" a query is where its first positive is."""


@job_section
class AuditSettings:
    """Section `audit`: limits that a version must keep; one beyond any of them is not published."""

    num_queries: PositiveInt = 256
    """Queries that are searched exactly as well, drawn anew for each version."""
    min_recall: Share = 0.9
    """Mean share of the exact search.top_k that the index has to find; index.nprobe is raised until it does."""
    max_suspected: Share = 1.0
    """Share of the unjudged candidates that score as positives do, by filter.relative_margin."""
    max_without: Share = 1.0
    """Share of the queries of whose candidates none passed the filters."""


def hard_depths(num_passages: int) -> tuple[int, int]:
    """Return how many candidates of a query, and how many negatives of them, are still hard ones in a corpus of this size."""
    num_negatives = max(1, min(16, num_passages // 20))
    return max(num_negatives, min(200, num_passages // 10)), num_negatives
