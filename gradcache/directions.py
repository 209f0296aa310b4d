"""Which rows are contrasted with which columns, in both directions and for both ways of gathering.

Every rank knows the 64-bit keys of the texts of all ranks; from these follow the masks, and where each positive stands.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradcache.field import Field, Group
from gradcache.masks import Masks, Pairing, Related, first_columns, first_of, relate
from gradcache.objectives.tile import EXTRA, OTHER_SIDE, SAME_SIDE
from gradcache.ragged import Ragged
from gradcache.siblings import Kin, siblings_of
from gradcache.terms import Chosen, Direction, Siblings, Source
from gradcache.transfers import upload

# B queries of this rank, Q of all, N columns of all ranks, s siblings

Side = Literal["queries", "targets"]


def directions(field: Field) -> list[Direction]:
    """Return the queries against the passages and, where asked for, each query's target passage against the queries.

    Waits for the device once, and once more where the objective wants siblings.
    """
    drafts = [_forth(field), *([_back(field)] if field.options.symmetric else [])]
    pairings = [draft.pairings(field) for draft in drafts]
    found = iter(relate([pairing for of_draft in pairings for pairing in of_draft]))
    related = [[next(found) for _ in of_draft] for of_draft in pairings]
    siblings = siblings_of(field, [d.kin(field, r) for d, r in zip(drafts, related, strict=True)])
    return [draft.direction(field, r, s) for draft, r, s in zip(drafts, related, siblings, strict=True)]


def count_masked(field: Field, direction: Direction) -> Tensor:
    """Return the masked cells of this rank's scores of queries against passages; a row's own positive is none of them."""
    number = list(direction.kinds).index(OTHER_SIDE)
    _, related = direction.masks.related[number]
    num_rows, own = len(direction.rows.rows_ND), field.counts.window("queries", field.rank)
    num_own = (first_of(field.keys.passage_P, field.keys.target_Q[own.start : own.stop]) >= 0).sum()
    return related.num_cells(slice(0, num_rows)) + num_rows * len(related.repeated) - num_own


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A direction before its masks are known."""

    groups: list[Group]
    sides: tuple[Side, Side]  # of the rows, and of their positives
    own: tuple[Source, Source]
    target_first_Q: Tensor  # the first column of the text of each row's own positive
    is_spread: bool
    chosen: Chosen | None = None
    hides_candidates: bool = False  # the columns of the first group that are candidates are masked

    def __post_init__(self) -> None:
        self.groups.sort(key=lambda group: not group.source.is_trained)

    def _number(self) -> int:
        """Return which of the groups is of the other side."""
        return next(i for i, group in enumerate(self.groups) if group.kind == OTHER_SIDE)

    def pairings(self, field: Field) -> list[Pairing]:
        """Return what is to be related: the columns of each group, and where siblings are spread those of all ranks."""
        rank = None if self.is_spread else field.rank
        found = [group.pairing(field.counts, rank) for group in self.groups]
        if self.hides_candidates:
            other, counts = self.groups[self._number()], field.counts
            hidden = replace(other, row_keys=field.keys.hidden, keys_of_ranks=counts.hidden)
            found.append(hidden.pairing(counts, rank))
        if self.is_spread and field.options.objective.wants_siblings:
            other = self.groups[self._number()]
            found.append(other.pairing(field.counts, field.rank, range(sum(self._columns_of_ranks(field)))))
        return found

    def kin(self, field: Field, related: list[Related]) -> Kin:
        """Return what siblings are found from."""
        number, own_window = self._number(), field.counts.window("queries", field.rank)
        group = self.groups[number]
        return Kin(
            group=group,
            first=self._firsts()[number],
            related=related[number],
            rows=range(len(self.target_first_Q)) if self.is_spread else own_window,
            own_related=related[-1] if self.is_spread else None,
            own_rows=own_window,
            target_first_Q=self.target_first_Q,
            columns_of_ranks=self._columns_of_ranks(field),
        )

    def _columns_of_ranks(self, field: Field) -> list[int]:
        """Return how many columns of the other side each rank has."""
        return field.counts.passages if self.sides[1] == "targets" else field.counts.queries

    def _firsts(self) -> list[int]:
        """Return where the columns of each group begin."""
        return list(itertools.accumulate((len(group.window) for group in self.groups), initial=0))

    def direction(self, field: Field, related: list[Related], siblings: Siblings) -> Direction:
        """Return the direction."""
        options, keys, objective = field.options, field.keys, field.options.objective
        placed = list(zip(self._firsts()[:-1], related, strict=False))
        repeated = torch.cat([of_group.repeated + first for first, of_group in placed])
        if self.hides_candidates:
            placed.append((self._firsts()[self._number()], related[len(self.groups)]))
        rows, second = field.pools.rows(self.sides[0], self.is_spread), None
        if objective.second is not None:
            of_rows = field.pools.rows(self.sides[1], self.is_spread) if objective.second == "positive" else rows
            second = of_rows, [group.source for group in self.groups], field.second_view
        device = keys.query_Q.device
        values = _on(device, field.batch.query_values)
        dtype = torch.promote_types(rows.rows_ND.dtype, torch.float32)
        travelled = {name: keys.values_QV[:, i].to(dtype) for i, name in enumerate(sorted(values))}
        return Direction(
            rows=rows,
            columns=[group.source for group in self.groups],
            kinds=[group.kind for group in self.groups],
            masks=Masks(repeated, placed),
            second=second,
            own_rows=self.own[0],
            own_positives=self.own[1],
            siblings=siblings,
            chosen=self.chosen,
            is_spread=self.is_spread,
            weight=(0.5 if options.symmetric and options.partition == "each" else 1.0) / len(keys.query_Q),
            values=values,
            row_values=travelled if self.is_spread else values,
        )


def _forth(field: Field) -> _Draft:
    """Return the queries against the passages."""
    pools, keys, is_spread = field.pools, field.keys, field.queries_travel
    texts = torch.cat([keys.passage_P, keys.extra_X])
    passages = Group(
        kind=OTHER_SIDE,
        source=pools.columns("passages", is_spread),
        window=field.window("passages", is_spread),
        first_N=first_columns(texts),
        row_keys=keys.positives,
        keys_of_ranks=field.counts.positives,
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
                keys_of_ranks=[sum(each) for each in zip(field.counts.positives, field.counts.queries, strict=True)],
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
        row, passage = upload(batch.candidates.query, device), upload(batch.candidates.passage, device)
        chosen = Chosen(
            row=row,
            passage=passage,
            num_of_rows=torch.bincount(batch.candidates.query.cpu(), minlength=batch.num_queries),
            source=pools.every_passage,
            values=_on(device, batch.candidates.values),
        )
    return _Draft(
        groups=groups,
        sides=("queries", "targets"),
        own=(pools.query, pools.target),
        target_first_Q=first_of(texts, keys.target_Q),
        is_spread=is_spread,
        chosen=chosen,
        hides_candidates=batch.candidates is not None and not batch.candidates.are_columns,
    )


def _back(field: Field) -> _Draft:
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
            keys_of_ranks=field.counts.queries,
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
                keys_of_ranks=field.counts.positives,
                column_keys=Ragged.of_table(keys.passage_P[:, None]),
            )
        )
    return _Draft(
        groups=groups,
        sides=("targets", "queries"),
        own=(pools.target, pools.query),
        target_first_Q=first_N,
        is_spread=is_spread,
    )


def _on(device: torch.device, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: upload(tensor, device) for name, tensor in values.items()}
