"""Which rows are contrasted with which columns, in both directions and for both ways of gathering.

Every rank knows the 64-bit keys of the texts of all ranks; from these follow the masks, and where each positive stands.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gradcache.field import Field, Group
from gradcache.masks import Masks, first_columns, repeated_columns
from gradcache.objectives.tile import EXTRA, OTHER_SIDE, SAME_SIDE
from gradcache.ragged import Ragged
from gradcache.siblings import siblings_of
from gradcache.terms import Chosen, Direction, Source

# B queries of this rank, Q of all, N columns of all ranks, s siblings


def forth(field: Field) -> Direction:
    """Return the queries against the passages."""
    pools, keys, is_spread = field.pools, field.keys, field.queries_travel
    texts = torch.cat([keys.passage_P, keys.extra_X])
    passages = Group(
        kind=OTHER_SIDE,
        source=pools.columns("passages", is_spread),
        window=field.window("passages", is_spread),
        first_N=first_columns(texts),
        row_keys=keys.positives,
        column_keys=Ragged.of_table(texts[:, None]),
    )
    groups = [passages]
    if field.options.same_side:
        # Its own text, and queries that share a positive, are no negatives of a query.
        known = keys.positives.with_column(keys.query_Q)
        groups.append(
            Group(
                kind=SAME_SIDE,
                source=pools.columns("queries", is_spread),
                window=field.window("queries", is_spread),
                first_N=first_columns(keys.query_Q),
                row_keys=known,
                column_keys=known,
            )
        )
    if pools.extra is not None:
        own, first = field.counts.window("extra", field.rank), len(keys.passage_P)
        window = range(first + own.start, first + own.stop)
        groups.append(replace(passages, kind=EXTRA, source=pools.extra, window=window))
    batch, device = field.batch, keys.query_Q.device
    chosen = None
    if batch.candidates is not None:
        row, passage = batch.candidates.query.to(device), batch.candidates.passage.to(device)
        chosen = Chosen(row=row, passage=passage, source=pools.every_passage, values=_on(device, batch.candidates.values))
    return _direction(
        field,
        groups,
        sides=("queries", "targets"),
        own=(pools.query, pools.target),
        target_first_Q=_first_of(texts, keys.target_Q),
        is_spread=is_spread,
        chosen=chosen,
    )


def back(field: Field) -> Direction:
    """Return each query's target passage against the queries."""
    pools, keys = field.pools, field.keys
    is_spread = field.queries_travel and field.options.same_side
    first_N = first_columns(keys.query_Q)
    groups = [
        Group(
            kind=OTHER_SIDE,
            source=pools.columns("queries", is_spread),
            window=field.window("queries", is_spread),
            first_N=first_N,
            row_keys=Ragged.of_table(keys.target_Q[:, None]),
            column_keys=keys.positives,
        )
    ]
    if field.options.same_side:  # other positives of its query are no negatives of a passage
        groups.append(
            Group(
                kind=SAME_SIDE,
                source=pools.columns("passages", is_spread),
                window=field.window("passages", is_spread),
                first_N=first_columns(keys.passage_P),
                row_keys=keys.positives,
                column_keys=Ragged.of_table(keys.passage_P[:, None]),
            )
        )
    return _direction(
        field,
        groups,
        sides=("targets", "queries"),
        own=(pools.target, pools.query),
        target_first_Q=first_N,
        is_spread=is_spread,
        chosen=None,
    )


def count_masked(field: Field, direction: Direction) -> int:
    """Return the masked cells of this rank's scores of queries against passages; a row's own positive is none of them."""
    number = list(direction.kinds).index(OTHER_SIDE)
    first, related = direction.masks.related[number]
    num_rows, repeated = len(direction.rows.rows_ND), direction.masks.repeated
    in_group = (repeated >= first) & (repeated < first + len(direction.columns[number].rows_ND))
    own = field.counts.window("queries", field.rank)
    passages = torch.isin(field.keys.target_Q[own.start : own.stop], field.keys.passage_P)
    return related.num_cells(slice(0, num_rows)) + num_rows * int(in_group.sum()) - int(passages.sum())


def _direction(
    field: Field,
    groups: list[Group],
    *,
    sides: tuple[Literal["queries", "targets"], Literal["queries", "targets"]],  # of the rows, and of their positives
    own: tuple[Source, Source],
    target_first_Q: Tensor,
    is_spread: bool,
    chosen: Chosen | None,
) -> Direction:
    options, keys, objective = field.options, field.keys, field.options.objective
    own_window = field.counts.window("queries", field.rank)
    window = range(len(keys.query_Q)) if is_spread else own_window
    ordered = sorted(groups, key=lambda group: not group.source.is_trained)
    firsts = list(itertools.accumulate((len(group.window) for group in ordered), initial=0))
    related = [(first, group.related(window)) for first, group in zip(firsts, ordered, strict=False)]
    repeated = [repeated_columns(g.first_N, g.window) + first for first, g in zip(firsts, ordered, strict=False)]
    rows, second = field.pools.rows(sides[0], is_spread), None
    if objective.second is not None:
        of_rows = field.pools.rows(sides[1], is_spread) if objective.second == "positive" else rows
        second = of_rows, [group.source for group in ordered], field.second_view
    number = next(i for i, group in enumerate(ordered) if group.kind == OTHER_SIDE)
    siblings = siblings_of(field, ordered[number], related[number], window, own_window, target_first_Q, is_spread)
    values = _on(keys.query_Q.device, field.batch.query_values)
    names = sorted(values)
    dtype = torch.promote_types(rows.rows_ND.dtype, torch.float32)
    travelled = {name: keys.values_QV[:, i].to(dtype) for i, name in enumerate(names)}
    return Direction(
        rows=rows,
        columns=[group.source for group in ordered],
        kinds=[group.kind for group in ordered],
        masks=Masks(torch.cat(repeated), related),
        second=second,
        own_rows=own[0],
        own_positives=own[1],
        siblings=siblings,
        chosen=chosen,
        is_spread=is_spread,
        weight=(0.5 if options.symmetric else 1.0) / len(keys.query_Q),
        values=values,
        row_values=travelled if is_spread else values,
    )


def _first_of(keys_N: Tensor, wanted: Tensor) -> Tensor:
    """Return the first column of each key, -1 where there is none."""
    if not len(keys_N):
        return torch.full_like(wanted, -1)
    ordered, order = keys_N.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys_N) - 1)
    return torch.where(ordered[place] == wanted, order[place], -1)


def _on(device: torch.device, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in values.items()}
