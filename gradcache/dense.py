"""The loss of all ranks in one graph, from the whole matrix of scores: the oracle for `global_loss`.

Masks come from comparing keys one by one, gradients from autograd alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache.batch import Batch
from gradcache.objectives.tile import (
    CANDIDATE,
    EXTRA,
    FLOOR,
    OTHER_SIDE,
    SAME_SIDE,
    SIBLING,
    Cells,
    Objective,
    Rows,
    Tile,
    merge_all,
)
from gradcache.options import LossOptions

# n rows of a rank, Q queries and P passages of all ranks


def reference_loss(
    embedded: Sequence[Tensor], batches: Sequence[Batch], *, loss: LossOptions, scale: Tensor, progress: float = 0.0
) -> Tensor:
    """Return the mean loss over the queries of all ranks with its graph, from what each rank has encoded, (n, D)."""
    width = max(rows.shape[1] for rows in embedded if len(rows))
    some = next(rows for rows in embedded if len(rows))
    embedded = [rows if len(rows) else some.new_zeros(0, width) for rows in embedded]
    derived = [rows if b.derive is None else b.derive(rows) for rows, b in zip(embedded, batches, strict=True)]
    query = torch.cat([rows[: b.num_queries] for rows, b in zip(derived, batches, strict=True)])
    passage = torch.cat([rows[b.num_queries :] for rows, b in zip(derived, batches, strict=True)])
    held = [batch.extra.embedding_xD.to(query) for batch in batches if batch.extra is not None]
    extra = torch.cat(held).detach() if held else query[:0].detach()
    outputs = batches[0].outputs or {"embedding": query.shape[1]}
    first = dict(zip(outputs, [sum(list(outputs.values())[:i]) for i in range(len(outputs))], strict=True))
    weights = loss.outputs or {next(iter(outputs)): 1.0}
    total = query.new_zeros(())
    for name, weight in weights.items():
        own = slice(first[name], first[name] + outputs[name])
        second = loss.objective.second
        guide = None
        if second is not None and second != "positive":
            guide = slice(first[second], first[second] + outputs[second])
        widths = loss.widths or (None,)
        width_weights = loss.width_weights or (1.0,) * len(widths)
        for w, width_weight in zip(widths, width_weights, strict=True):
            sides = [rows[:, own] if w is None else normalize(rows[:, own][:, :w], dim=1) for rows in (query, passage, extra)]
            guides = sides if guide is None else [rows[:, guide] for rows in (query, passage, extra)]
            term = _Both(batches, loss, scale, progress, _Sides(*sides), _Sides(*guides)).loss()
            total = total + weight / sum(weights.values()) * width_weight / sum(width_weights) * term
    rows = torch.cat(derived)
    keys = torch.cat([batch.keys for batch in batches]).to(rows.device)
    for text_term in loss.text_terms:
        total = total + text_term.weight * text_term.function(rows, keys).mean()
    return total


@dataclass(frozen=True)
class _Sides:
    """All rows in one view."""

    query: Tensor
    passage: Tensor
    extra: Tensor


_Cell = tuple[int, int, Tensor, Mapping[str, float]]  # row, kind, score, values


@dataclass
class _Both:
    """Both directions of the loss in one view of the embeddings."""

    batches: Sequence[Batch]
    options: LossOptions
    scale: Tensor
    progress: float
    sides: _Sides
    guides: _Sides  # of the second matrix

    def __post_init__(self) -> None:
        self.query_keys = [key for b in self.batches for key in b.keys[: b.num_queries].tolist()]
        self.passage_keys = [key for b in self.batches for key in b.keys[b.num_queries :].tolist()]
        self.extra_keys = [key for b in self.batches if b.extra is not None for key in b.extra.keys.tolist()]
        self.is_column = [
            c for b in self.batches for c in ([True] * b.num_passages if b.own_only is None else (~b.own_only).tolist())
        ]
        self.targets: list[int] = []
        self.positives: list[set[int]] = []
        self.known: list[dict[int, dict[str, float]]] = []
        self.hidden: list[set[int]] = []
        start = 0
        for batch in self.batches:
            self.targets += [start + target for target in batch.target.tolist()]
            values = [column.tolist() for column in batch.positive_values.values()]
            place = 0
            for count in batch.positives.counts_n.tolist():
                keys = batch.positives.values_m[place : place + count].tolist()
                of_keys = {
                    k: {n: v[place + i] for n, v in zip(batch.positive_values, values, strict=True)} for i, k in enumerate(keys)
                }
                self.positives.append(set(keys))
                self.known.append(of_keys)
                place += count
            hidden = batch.hidden.values_m.split(batch.hidden.counts_n.tolist())
            self.hidden += [set(keys.tolist()) for keys in hidden]
            start += batch.num_passages
        for row, target in enumerate(self.targets):
            self.positives[row] = self.positives[row] | {self.passage_keys[target]}

    def loss(self) -> Tensor:
        """Return the mean over the queries, or of both directions."""
        objective, forth = self.options.objective, self._forth()
        if not self.options.symmetric:
            return _mean_loss(objective, [forth])
        back = self._back()
        if self.options.partition == "joint":
            return _mean_loss(objective, [forth, back])
        return (_mean_loss(objective, [forth]) + _mean_loss(objective, [back])) / 2

    def _forth(self) -> "_Direction":
        columns = [i for i, is_column in enumerate(self.is_column) if is_column]
        texts = [*(self.passage_keys[i] for i in columns), *self.extra_keys]
        related = [
            [key in positives or key in hidden for key in texts]
            for positives, hidden in zip(self.positives, self.hidden, strict=True)
        ]
        groups = [
            _Columns(
                OTHER_SIDE,
                self.sides.passage[columns],
                self.guides.passage[columns],
                texts[: len(columns)],
                [r[: len(columns)] for r in related],
            )
        ]
        if self.extra_keys:
            copies = [key in texts[:i] for i, key in enumerate(texts)][len(columns) :]
            masked = [[m or c for m, c in zip(row[len(columns) :], copies, strict=True)] for row in related]
            groups.append(_Columns(EXTRA, self.sides.extra, self.guides.extra, self.extra_keys, masked))
        if self.options.same_side:
            # Queries of one text, or with a positive in common, are no negatives of each other.
            known = [{key, *keys} for key, keys in zip(self.query_keys, self.positives, strict=True)]
            is_related = [
                [any(known[i] & known[k] for k in self._of_text(j)) for j in range(len(known))] for i in range(len(known))
            ]
            groups.append(_Columns(SAME_SIDE, self.sides.query, self.guides.query, self.query_keys, is_related))
        own = self.sides.passage[self.targets]
        positive = self.options.objective.pair_scores(self.sides.query, own)
        cells: list[_Cell] = []
        for row, target in enumerate(self.targets):
            for place, key in enumerate(texts[: len(columns)]):
                is_sibling = key in self.positives[row] and key not in texts[:place] and key != self.passage_keys[target]
                if is_sibling:
                    cells.append(
                        (row, SIBLING, self.sides.query[row] @ self.sides.passage[columns[place]], self.known[row].get(key, {}))
                    )
        first_query = first_passage = 0
        for batch in self.batches:
            if batch.candidates is not None:
                values = {n: v.tolist() for n, v in batch.candidates.values.items()}
                pairs = zip(batch.candidates.query.tolist(), batch.candidates.passage.tolist(), strict=True)
                for i, (q, p) in enumerate(pairs):
                    score = self.sides.query[first_query + q] @ self.sides.passage[first_passage + p]
                    cells.append((first_query + q, CANDIDATE, score, {n: v[i] for n, v in values.items()}))
            first_query, first_passage = first_query + batch.num_queries, first_passage + batch.num_passages
        second_rows = self._second_rows(own, self.guides.query)
        return self._direction(self.sides.query, positive, groups, cells, second_rows)

    def _back(self) -> "_Direction":
        rows = self.sides.passage[self.targets]
        own_keys = [self.passage_keys[target] for target in self.targets]
        # A query text is a positive of a passage if one of the queries of that text has it.
        is_positive = [
            [any(key in self.positives[k] for k in self._of_text(j)) for j in range(len(self.query_keys))] for key in own_keys
        ]
        groups = [_Columns(OTHER_SIDE, self.sides.query, self.guides.query, self.query_keys, is_positive)]
        if self.options.same_side:
            columns = [i for i, is_column in enumerate(self.is_column) if is_column]
            texts = [self.passage_keys[i] for i in columns]
            related = [[key in positives for key in texts] for positives in self.positives]
            groups.append(_Columns(SAME_SIDE, self.sides.passage[columns], self.guides.passage[columns], texts, related))
        cells: list[_Cell] = [
            (row, SIBLING, rows[row] @ self.sides.query[column], {})
            for row in range(len(rows))
            for column, key in enumerate(self.query_keys)
            if is_positive[row][column] and key not in self.query_keys[:column] and key != self.query_keys[row]
        ]
        second_rows = self._second_rows(self.sides.query, self.guides.passage[self.targets])
        return self._direction(rows, (rows * self.sides.query).sum(1), groups, cells, second_rows)

    def _of_text(self, query: int) -> list[int]:
        return [k for k, key in enumerate(self.query_keys) if key == self.query_keys[query]]

    def _second_rows(self, positives: Tensor, guides: Tensor) -> Tensor | None:
        if self.options.objective.second is None:
            return None
        return positives if self.options.objective.second == "positive" else guides

    def _direction(
        self,
        rows: Tensor,
        positive: Tensor,
        groups: Sequence["_Columns"],
        cells: list[_Cell],
        second_rows: Tensor | None,
    ) -> "_Direction":
        objective = self.options.objective
        if not any(len(group.keys) for group in groups):  # one masked column stands in for none, as in the tiles
            one, guide = groups[0].rows.new_zeros(1, rows.shape[1]), groups[0].guides.new_zeros(1, groups[0].guides.shape[1])
            groups = [_Columns(OTHER_SIDE, one, guide, [0], [[True]] * len(rows))]
        columns = torch.cat([group.rows for group in groups])
        masked = [[m for group in groups for m in group.masked(row)] for row in range(len(rows))]
        is_masked = torch.tensor(masked, dtype=torch.bool, device=rows.device)
        second = None
        if second_rows is not None:
            guides = columns if objective.second == "positive" else torch.cat([group.guides for group in groups])
            second = (second_rows @ guides.T).detach()
        names = sorted(self.batches[0].query_values)
        values = {name: torch.cat([b.query_values[name] for b in self.batches]).to(rows) for name in names}
        scores = rows @ columns.T
        if self.options.false_negatives is not None:
            is_masked = is_masked | (scores > self.options.false_negatives.thresholds(positive)[:, None]).detach()
        tile = Tile(
            scores_tP=torch.where(is_masked, FLOOR, scores),
            scale=self.scale.to(rows.dtype),
            positive_t=positive if objective.returns_positive else positive.detach(),
            kind_P=torch.cat([torch.full((len(g.rows),), g.kind, dtype=torch.int8, device=rows.device) for g in groups]),
            row_values=values,
            second_tP=second,
            progress=self.progress,
        )
        wanted = [cell for cell in cells if cell[1] == CANDIDATE or objective.wants_siblings]
        wanted.sort(key=lambda cell: cell[0])
        limits = self.options.false_negatives
        threshold = None if limits is None else limits.thresholds(positive).detach()
        return _Direction(tile, positive, wanted, values, threshold)


@dataclass(frozen=True)
class _Direction:
    """Rows, their scores against all columns, and their cells."""

    tile: Tile
    positive: Tensor
    cells: list[_Cell]
    values: Mapping[str, Tensor]
    threshold: Tensor | None


def _mean_loss(objective: Objective, directions: Sequence[_Direction]) -> Tensor:
    """Return the mean loss of the first direction's rows; the columns of a second one are further columns of the same rows."""
    first = directions[0]
    tile, positive, cells, values = first.tile, first.positive, first.cells, first.values
    device = positive.device
    of_cells = sorted({*objective.cell_values, *(name for *_, known in cells for name in known)})
    rows = Rows(
        statistics_tS=merge_all(torch.stack([objective.statistics(each.tile) for each in directions]), objective.merges),
        scale=tile.scale,
        positive_t=positive,
        cells=Cells(
            row_c=torch.tensor([row for row, *_ in cells], dtype=torch.int64, device=device),
            kind_c=torch.tensor([kind for _, kind, *_ in cells], dtype=torch.int8, device=device),
            score_c=torch.stack([score for *_, score, _ in cells]) if cells else positive[:0],
            values={n: torch.tensor([k.get(n, torch.nan) for *_, k in cells]).to(positive) for n in of_cells},
        ),
        threshold_t=first.threshold,
        values=values,
        is_joint=len(directions) > 1,
        progress=tile.progress,
    )
    if objective.gathered_width:
        rows = replace(rows, batch=objective.batch_statistics(rows))
    elif objective.batch_merges:
        batch = merge_all(objective.batch_statistics(rows)[:, None], objective.batch_merges)[0]
        rows = replace(rows, batch=batch)
    losses = objective.loss(rows)
    return (losses * values["weight"] if "weight" in values else losses).mean()


@dataclass(frozen=True)
class _Columns:
    """Columns of one kind, their keys, and which of them each row has to leave out whatever their place is."""

    kind: int
    rows: Tensor
    guides: Tensor
    keys: Sequence[int]
    related: Sequence[Sequence[bool]]

    def masked(self, row: int) -> list[bool]:
        """Return which columns are no negatives of a row: related ones, and copies of an earlier column."""
        return [self.related[row][i] or key in self.keys[:i] for i, key in enumerate(self.keys)]
