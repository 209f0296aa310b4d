"""`prove`: values and gradients of an objective, whatever the cut into tiles and ranks.

In float64, within one process and in a second or two. First the objective by itself, its tiles cut and filled in several ways.
Then whole steps on one to three ranks, which are threads, against one process and one graph (`gradcache/reference.py`).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradcache.objectives.tile import Merge, Objective, Rows, Tile, log_sum_exp
from gradcache.options import FalseNegatives, LossOptions
from gradcache.replay import borrowed_generators
from gradcache.testing.changes import Changed, changes
from gradcache.testing.found import Found, by_oracle, by_steps, leaves_of, oracle_loss, temperature
from gradcache.testing.made_up import MadeUp, make_up

QUOTIENT_STEP, QUOTIENT_TOLERANCE = 1e-6, 1e-4  # of difference quotients in float64, whose own error is about 1e-8
LIMITS = FalseNegatives(max_score=0.6, absolute_margin=-0.2)
ROWS = [(5,), (3, 2), (0, 4), (2, 0, 3)]  # queries of each rank
SETTINGS: list[dict[str, Any]] = [  # rows of a tile that do and do not divide what there is
    {"gather": "passages", "symmetric": False, "same_side": False, "tile_rows": None, "keep_scores_gib": None},
    {"gather": "queries", "symmetric": True, "same_side": True, "tile_rows": 2, "keep_scores_gib": None},
    {"gather": "queries", "symmetric": True, "same_side": False, "tile_rows": 1, "keep_scores_gib": 0.0},
    {"gather": "passages", "symmetric": True, "same_side": True, "tile_rows": 3, "keep_scores_gib": 0.0},
    {"gather": "queries", "symmetric": False, "same_side": True, "tile_rows": None, "keep_scores_gib": 0.0},
    {"gather": "passages", "symmetric": True, "same_side": False, "tile_rows": 2, "false_negatives": LIMITS},
    {"gather": "queries", "symmetric": True, "same_side": True, "tile_rows": 3, "false_negatives": LIMITS},
]
JOINT: dict[str, Any] = {"gather": "queries", "symmetric": True, "same_side": True, "tile_rows": 2, "partition": "joint"}


def prove(
    objective: Objective, *, symmetric: bool = True, stops_gradient: bool = False, query_values: Sequence[str] = ()
) -> None:
    """Raise AssertionError, with a sentence that says what is wrong, unless the objective's values and gradients are right.

    symmetric: whether the loss has the direction from passages to queries, too. stops_gradient: whether it detaches something by
    intent; otherwise its gradient has to be the derivative of its value. query_values: names that it reads of
    `batch.query_values`. The objective and the random generators stay as they are.
    """
    objective = copy.deepcopy(objective)
    if isinstance(objective, nn.Module):
        objective.double()
    symmetric = symmetric and not objective.has_pair_scores
    query_values = list(dict.fromkeys([*query_values, *objective.row_values]))
    with borrowed_generators():
        made = make_up(objective, (5,), query_values, has_extra=True)
        options = LossOptions(objective=objective, symmetric=symmetric, same_side=True)
        _check_shapes(made, options)
        related = make_up(objective, (3,), query_values, all_related=True)
        _check_without_negatives(related, options)
        whole = by_oracle(made, options, objective)
        for change in changes(objective):
            found = by_oracle(made, replace(options, objective=change.objective), objective)
            if (words := found.difference(whole)) is not None:
                raise AssertionError(f"{_name(objective)}: {words} {change.meaning}")
        if not stops_gradient:
            _check_derivative(made, options, whole)
        _check_step(related, options)
        for rows in ROWS:
            for setting in [*SETTINGS, *([JOINT] if objective.joins and symmetric else [])]:
                made = make_up(objective, rows, query_values, has_extra=setting["gather"] == "queries")
                _check_step(made, LossOptions(objective=objective, **setting | {"symmetric": symmetric and setting["symmetric"]}))


def _check_shapes(made: MadeUp, options: LossOptions) -> None:
    objective, name = options.objective, _name(options.objective)

    def check_merges(part: str, found: Tensor, num_rows: int, attribute: str, merges: Sequence[Merge]) -> Tensor:
        width = sum(merge.width for merge in merges)
        if found.shape != (num_rows, width):
            raise AssertionError(
                f"{name}.{part} returns {tuple(found.shape)} for {num_rows} rows, and its {attribute} take {(num_rows, width)}; "
                "each statistic needs a merge"
            )
        return found

    def statistics(tile: Tile) -> Tensor:
        found = check_merges("statistics", objective.statistics(tile), len(tile.scores_tP), "merges", objective.merges)
        if objective.is_soft_max and not torch.allclose(
            found, log_sum_exp(tile.weighted_logits(objective.column_hardness))[:, None]
        ):
            raise AssertionError(
                f"{name} has is_soft_max=True, and its statistics are not the log-sum-exp of its logits; set it to False"
            )
        return found

    def batch_statistics(rows: Rows) -> Tensor:
        found, num_rows, width = objective.batch_statistics(rows), len(rows.positive_t), objective.gathered_width
        if not width:
            return check_merges("batch_statistics", found, num_rows, "batch_merges", objective.batch_merges)
        if found.shape != (num_rows, width):
            raise AssertionError(
                f"{name}.batch_statistics returns {tuple(found.shape)} for {num_rows} rows, and gathered_width={width}"
            )
        return found

    def loss(rows: Rows) -> Tensor:
        found = objective.loss(rows)
        if found.shape != rows.positive_t.shape:
            raise AssertionError(
                f"{name}.loss returns {tuple(found.shape)} for {len(rows.positive_t)} rows; expected one of each"
            )
        return found

    checked = Changed(objective, statistics=statistics, batch_statistics=batch_statistics, loss=loss)
    by_oracle(made, replace(options, objective=checked), objective)


def _check_without_negatives(made: MadeUp, options: LossOptions) -> None:
    for words, values in by_oracle(made, options, options.objective).named().items():
        if not bool(values.isfinite().all()):
            raise AssertionError(f"{_name(options.objective)}: {words} is not finite where a row has no negatives")


def _check_derivative(made: MadeUp, options: LossOptions, whole: Found) -> None:
    """Compare each gradient with a difference quotient in a random direction."""
    own, generator = temperature(), torch.Generator().manual_seed(1)
    leaves = leaves_of(made, own, options.objective)
    if options.objective.second is not None:  # its scores depend on the embeddings, and give no gradient
        del leaves["the embeddings"]
    for name, tensors in leaves.items():
        tangents = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors]
        starts = [tensor.detach().clone() for tensor in tensors]
        values = {}
        for step in (QUOTIENT_STEP, -QUOTIENT_STEP, 0.0):
            with torch.no_grad():
                for tensor, start, tangent in zip(tensors, starts, tangents, strict=True):
                    tensor.copy_(start + step * tangent)
            values[step] = float(oracle_loss(made, options, own).detach())
        quotient = (values[QUOTIENT_STEP] - values[-QUOTIENT_STEP]) / (2 * QUOTIENT_STEP)
        found = float(whole.gradients[name] @ torch.cat([tangent.flatten() for tangent in tangents]))
        if not abs(quotient - found) <= QUOTIENT_TOLERANCE * max(1.0, abs(quotient)):
            raise AssertionError(
                f"{_name(options.objective)}: the gradient of {name} is not the derivative of the loss, in one direction "
                f"{found:.4g} and not {quotient:.4g}; something is detached, or returns_positive=True is missing; "
                "if it is meant, say stops_gradient=True"
            )


def _check_step(made: MadeUp, options: LossOptions) -> None:
    rows = [batch.num_queries for batch in made.batches]
    named = (*SETTINGS[0], "partition", "false_negatives")
    said = ", ".join(f"{name}={getattr(options, name)!r}" for name in named)
    where = f"in a step on {len(rows)} ranks of {rows} queries, {said}"
    wanted = by_oracle(made, options, options.objective)
    try:
        found = by_steps(made, options)
    except Exception as error:
        raise AssertionError(f"{_name(options.objective)} fails with {type(error).__name__} {where}: {error}") from error
    for of_rank in found:
        if (words := of_rank.difference(wanted)) is not None:
            raise AssertionError(f"{_name(options.objective)}: {words} from the oracle's {where}")


def _name(objective: Objective) -> str:
    return type(objective).__name__
