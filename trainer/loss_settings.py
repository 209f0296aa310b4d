"""What section `loss` of a job says."""

import itertools
import typing
from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from trainer.errors import InputError
from trainer.handoff.settings import Gather, Parameters, SourceSettings
from trainer.ranges import job_section

if typing.TYPE_CHECKING:  # torch takes seconds, and the usual objective needs no look
    from gradcache import FalseNegatives, Objective

PLAIN = "info_nce"
LIMITS = ("max_score", "absolute_margin", "relative_margin")


@job_section
class LossSettings:
    """Section `loss`: what embeddings are trained towards."""

    preset: str | None = None
    """A published system whose settings hold where the job says nothing; `negpool train JOB.toml --explain` prints them."""
    objective: str = PLAIN
    """What a query's scores become: a name that `negpool objectives` lists, or "module:name" of your own."""
    parameters: Parameters = field(default_factory=dict)
    """What the objective takes, by name; `negpool objectives` lists them."""
    max_score: float | None = None
    """Passages of the batch that score more are no negatives of a query, but positives that nobody has judged."""
    absolute_margin: float | None = None
    """The same of those above s_pos - margin; -0.1 lets scores up to 0.1 above the positive's stay (UniME)."""
    relative_margin: NonNegativeFloat | None = None
    """The same of those above s_pos - |s_pos| * margin (NV-Retriever's rule, of the batch)."""
    symmetric: bool = False
    """Also passage -> query, mean of both directions."""
    partition: Literal["each", "joint"] = "each"
    """With symmetric: each direction has its own denominator, or both have one, as in GTE."""
    same_side: bool = False
    """A direction's own side as negatives, too: query-query, and symmetric passage-passage."""
    gather: Gather = "auto"
    """What travels to the other ranks: passages, or queries, so that hard negatives cost no traffic; auto: what is cheaper."""
    keep_scores_gib: NonNegativeFloat | None = None
    """Of scores kept for the gradient, where queries travel; None: 1 on a CPU, a quarter of what is free on a GPU."""
    tile_rows: PositiveInt | None = None
    """Rows of scores at once; None: as many as fit a fixed memory."""
    temperature: PositiveFloat = 0.05
    """Divides the scores."""
    learn_temperature: bool = False
    """Learn the temperature, from that one on."""
    min_temperature: PositiveFloat = 0.01
    """Of a learnt one, which falls without end where pairs are easily told apart; CLIP's."""
    widths: tuple[PositiveInt, ...] | None = None
    """Falling: the mean of the losses of embeddings cut to so many components."""
    width_weights: tuple[PositiveFloat, ...] | None = None
    """Weights of that mean; None: equal ones."""

    def __post_init__(self) -> None:
        if self.learn_temperature and self.temperature < self.min_temperature:
            raise InputError(
                f"loss.temperature={self.temperature}, where a learnt one starts, is below loss.min_temperature="
                f"{self.min_temperature}; set one of them to the other"
            )
        self._check_widths()
        if not self.is_plain or self.partition == "joint":
            self.build_objective()

    @property
    def is_plain(self) -> bool:
        """Whether the objective is InfoNCE as it is."""
        return self.objective == PLAIN and not self.parameters

    def build_objective(self) -> "Objective":
        """Return the objective of the job; raises InputError if it does not fit the section."""
        return self._built("loss", self.objective, self.parameters)

    def objective_of(self, name: str, source: SourceSettings) -> "Objective":
        """Return the objective that a source names; raises InputError if it does not fit this section."""
        assert source.objective is not None, "the caller has looked"
        return self._built(f"sources.{name}", source.objective, source.parameters or {})

    def _built(self, where: str, name: str, parameters: Parameters) -> "Objective":
        from gradcache import find_objective

        try:
            found = find_objective(name, parameters)
        except ValueError as error:
            raise InputError(f"{where}.objective: {error}") from error
        if self.partition == "joint" and not (self.symmetric and found.joins):
            raise InputError(
                f'loss.partition="joint" puts both directions into one denominator, which needs loss.symmetric=true and an '
                f"objective that has one; found symmetric={str(self.symmetric).lower()} and {where}.objective={name!r}"
            )
        if self.symmetric and not found.sees_columns:
            raise InputError(
                f"{where}.objective={name!r} looks at a query's own passages alone, which has one direction; set "
                "loss.symmetric=false"
            )
        if found.needs_same_side and not self.same_side:
            raise InputError(f"{where}.objective={name!r} is about texts of one side; set loss.same_side=true")
        if not found.sees_columns and self.limits is not None:
            raise InputError(f"{where}.objective={name!r} looks at no negatives; take {' and '.join(self._given_limits())} away")
        return found

    @property
    def limits(self) -> "FalseNegatives | None":
        """The limits of false negatives; None: there are none."""
        given = self._given_limits()
        if not given:
            return None
        from gradcache import FalseNegatives

        return FalseNegatives(**{name.removeprefix("loss."): value for name, value in given.items()})

    def _given_limits(self) -> dict[str, float]:
        return {f"loss.{name}": getattr(self, name) for name in LIMITS if getattr(self, name) is not None}

    def _check_widths(self) -> None:
        widths, weights = self.widths, self.width_weights
        if widths is None and weights is not None:
            raise InputError(f"loss.width_weights={list(weights)} weighs nothing; set loss.widths, too")
        if widths is not None and (not widths or any(wide <= narrow for wide, narrow in itertools.pairwise(widths))):
            expected = "expected one or more that fall, each at least 1, as in [384, 192, 96]"
            raise InputError(f"loss.widths are {list(widths)}; {expected}")
        if widths is not None and weights is not None and len(weights) != len(widths):
            raise InputError(
                f"loss.width_weights are {list(weights)}; expected one above 0 for each of loss.widths={list(widths)}"
            )

    def check_model(self, width: int) -> None:
        """Raise InputError if embeddings of a width cannot be cut as asked for."""
        if self.widths is not None and self.widths[0] > width:
            raise InputError(f"loss.widths begins with {self.widths[0]}, and the model's embeddings have {width} components")

    def check_memory(self, memory_bytes: int) -> None:
        """Raise InputError if more scores are to be kept than a rank's memory holds."""
        asked, has = self.keep_scores_gib, memory_bytes / 2**30
        if asked is not None and asked > has:
            raise InputError(
                f"loss.keep_scores_gib={asked:g} is more than the {has:.1f} GiB of memory that a rank has; set it lower"
            )
