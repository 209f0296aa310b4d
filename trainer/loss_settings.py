"""What section `loss` of a job says."""

import itertools

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from trainer.errors import InputError
from trainer.handoff.settings import Gather, Objective
from trainer.ranges import job_section


@job_section
class LossSettings:
    """Section `loss`: what embeddings are trained towards."""

    objective: Objective = "info_nce"
    """What a query's scores become."""
    symmetric: bool = False
    """Also passage -> query, mean of both directions."""
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
