"""Which rows are contrasted with which columns, in both directions and for both ways of gathering.

Every rank knows the 64-bit keys of the texts of all ranks; from these follow the masks, and where each positive stands.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gradcache.batch import Batch
from gradcache.exchange import Counts, Keys, starts
from gradcache.masks import Masks, Related, first_columns, relate, repeated_columns
from gradcache.objectives.tile import EXTRA, OTHER_SIDE, SAME_SIDE
from gradcache.options import LossOptions
from gradcache.ragged import Ragged
from gradcache.terms import Chosen, Direction, Siblings, Source
from gradcache.widths import View

# B queries of this rank, Q of all, N columns of all ranks, s siblings


@dataclass(frozen=True, kw_only=True)
class Pools:
    """The rows of this rank, and those of all ranks that have travelled."""

    query: Source
    target: Source  # of each query
    passage: Source  # that are columns
    every_passage: Source  # of this rank
    extra: Source | None
    travelled: Mapping[str, Source] = field(default_factory=dict)  # of all ranks: queries, targets, passages

    def columns(self, name: Literal["queries", "targets", "passages"], is_spread: bool) -> Source:
        """Return this rank's own columns of a side, or those of all ranks."""
        if not is_spread:
            return self.travelled[name]
        return {"queries": self.query, "targets": self.target, "passages": self.passage}[name]

    def rows(self, name: Literal["queries", "targets"], is_spread: bool) -> Source:
        """Return the rows of a side: of this rank, or where its columns are spread of all ranks."""
        if is_spread:
            return self.travelled[name]
        return self.query if name == "queries" else self.target


@dataclass(frozen=True, kw_only=True)
class Field:
    """What directions are made from."""

    batch: Batch
    options: LossOptions
    pools: Pools
    keys: Keys
    counts: Counts
    rank: int
    queries_travel: bool  # and passages stay; otherwise the other way round
    second_view: View | None  # of the second matrix, where the objective wants one of an output's name

    def window(self, name: str, is_spread: bool) -> range:
        """Return this rank's columns among those of all ranks: its own, or where they have travelled all."""
        return self.counts.window(name, self.rank) if is_spread else range(sum(getattr(self.counts, name)))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Columns of one kind."""

    kind: int
    source: Source
    window: range  # of the columns of all ranks
    first_N: Tensor
    row_keys: Ragged  # of the rows of all ranks: a column that has one of them is no negative
    column_keys: Ragged

    def related(self, rows: range, window: range | None = None) -> Related:
        return relate(_part(self.row_keys, rows), self.column_keys, self.first_N, self.window if window is None else window)


def forth(field: Field) -> Direction:
    """Return the queries against the passages."""
    pools, keys, is_spread = field.pools, field.keys, field.queries_travel
    texts = torch.cat([keys.passage_P, keys.extra_X])
    passages = _Group(
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
            _Group(
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
        _Group(
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
            _Group(
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
    groups: list[_Group],
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
    siblings = _siblings(field, ordered[number], related[number], window, own_window, target_first_Q, is_spread)
    values = _on(keys.query_Q.device, field.batch.query_values)
    names = sorted(values)
    travelled = {name: keys.values_QV[:, i].to(torch.float32) for i, name in enumerate(names)}
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


def _siblings(
    field: Field,
    group: _Group,
    related: tuple[int, Related],
    window: range,
    own_window: range,
    target_first_Q: Tensor,
    is_spread: bool,
) -> Siblings:
    none = target_first_Q.new_zeros(0)
    num_ranks = len(field.counts.queries)
    if not field.options.objective.wants_siblings:
        return Siblings(row=none, column=none, sent=[0] * num_ranks, own_row=none, received=[0] * num_ranks, values={})
    row, column = _others(related[1], window, group.window.start, target_first_Q)
    if not is_spread:
        values = _sibling_values(field, group, row, column + group.window.start)
        return Siblings(row=row, column=column + related[0], sent=[len(row)], own_row=row, received=[len(row)], values=values)
    name = "passages" if group.kind == OTHER_SIDE and group.source is field.pools.passage else "queries"
    every = range(sum(getattr(field.counts, name)))
    own_row, own_column = _others(group.related(own_window, every), own_window, 0, target_first_Q)
    of_rank = _owner(own_column, getattr(field.counts, name))
    order = of_rank.argsort(stable=True)
    return Siblings(
        row=row,
        column=column + related[0],
        sent=torch.bincount(_owner(row, field.counts.queries), minlength=num_ranks).tolist(),
        own_row=own_row[order],
        received=torch.bincount(of_rank, minlength=num_ranks).tolist(),
        values=_sibling_values(field, group, own_row[order], own_column[order]),
    )


def _others(related: Related, rows: range, first_column: int, target_first_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells of all rows but those of the text of the row's own positive."""
    row, column = related.cells(slice(0, len(rows)))
    is_other = column + first_column != target_first_Q[rows.start : rows.stop][row]
    return row[is_other], column[is_other]


def _sibling_values(field: Field, group: _Group, row_s: Tensor, column_s: Tensor) -> dict[str, Tensor]:
    """Return what the batch says of this rank's queries' judged positives; nothing of a passage's queries."""
    batch = field.batch
    if not batch.positive_values or group.row_keys is not field.keys.positives:
        return {}
    key_s = group.column_keys.values_m[column_s]  # texts have one key each
    known = batch.positives.to(key_s.device)
    _, number = torch.unique(torch.cat([known.values_m, key_s]), return_inverse=True)
    most = int(number.max()) + 1 if len(number) else 1
    known_pair = known.rows_m * most + number[: len(known.values_m)]
    wanted = row_s * most + number[len(known.values_m) :]
    order = known_pair.argsort()
    place = order[torch.searchsorted(known_pair[order], wanted).clamp(max=max(0, len(order) - 1))] if len(order) else wanted
    return {name: values.to(key_s.device)[place] for name, values in batch.positive_values.items()}


def _first_of(keys_N: Tensor, wanted: Tensor) -> Tensor:
    """Return the first column of each key, -1 where there is none."""
    if not len(keys_N):
        return torch.full_like(wanted, -1)
    ordered, order = keys_N.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys_N) - 1)
    return torch.where(ordered[place] == wanted, order[place], -1)


def _owner(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rank of each row of all ranks."""
    edges = torch.tensor(starts(counts)[1:], device=rows.device)
    return torch.searchsorted(edges, rows, right=True)


def _part(rows: Ragged, window: range) -> Ragged:
    return rows if len(window) == len(rows.counts_n) else rows.slice(slice(window.start, window.stop))


def _on(device: torch.device, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in values.items()}
