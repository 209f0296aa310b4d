"""The same step in one process and one graph: the oracle for `cached_step`.

Written to be obviously right, not to be fast or small: all ranks' batches, the full score matrix, masks by comparing keys one by
one, autograd for everything. Shares with the step only the plan of chunks and their seeds, so that both draw the same
dropout, and the objective, which has its own tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from gradcache.plan import Plan, chunks_of_each_tower, encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.temperature import Temperature

# n rows of a rank, Q queries and P passages of all ranks


def reference_step(
    batches: Sequence[Batch],
    *,
    loss: LossOptions,
    temperature: Temperature,
    chunk_tokens: int,
    seed: int,
    step: int,
    progress: float = 0.0,
    equal_chunks: bool = False,
) -> float:
    """Return the mean loss over the queries of all ranks and add its gradient to the parameters and the temperature.

    batches: one for each rank, in order, with towers that encode in this process. Does not communicate.
    equal_chunks: plan as a step does whose backend communicates in forwards, which needs as many chunks on every rank.
    """
    plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank) for rank, batch in enumerate(batches)]
    if equal_chunks:
        counts = [chunks_of_each_tower(plan, batch.towers) for plan, batch in zip(plans, batches, strict=True)]
        most = [max(count) for count in zip(*counts, strict=True)]
        plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank, most) for rank, batch in enumerate(batches)]
    with borrowed_generators():
        embedded = [_encode(plan) for plan in plans]
    total = reference_loss(embedded, batches, loss=loss, scale=temperature.scale(), progress=progress)
    total.backward()
    return total.item()


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
            sides = [rows[:, own] if w is None else normalize(rows[:, own][:, :w], dim=1) for rows in (query, passage)]
            guides = sides if guide is None else [query[:, guide], passage[:, guide]]
            extras = [None if b.extra is None else b.extra.embedding_xD.to(query) for b in batches]
            extra = torch.cat([e for e in extras if e is not None]) if any(e is not None for e in extras) else query[:0]
            viewed = extra[:, own] if w is None else normalize(extra[:, own][:, :w], dim=1)
            extra_guide = viewed if guide is None else extra[:, guide]
            term = _Both(batches, loss, scale, progress, *sides, *guides, viewed.detach(), extra_guide.detach()).loss()
            total = total + weight / sum(weights.values()) * width_weight / sum(width_weights) * term
    rows = torch.cat(derived)
    keys = torch.cat([batch.keys for batch in batches]).to(rows.device)
    for text_term in loss.text_terms:
        total = total + text_term.weight * text_term.function(rows, keys).mean()
    return total


@dataclass
class _Both:
    """Both directions of the loss in one view of the embeddings."""

    batches: Sequence[Batch]
    options: LossOptions
    scale: Tensor
    progress: float
    query: Tensor
    passage: Tensor
    query_guide: Tensor
    passage_guide: Tensor
    extra: Tensor
    extra_guide: Tensor

    def __post_init__(self) -> None:
        self.query_keys = [key for b in self.batches for key in b.keys[: b.num_queries].tolist()]
        self.passage_keys = [key for b in self.batches for key in b.keys[b.num_queries :].tolist()]
        self.extra_keys = [key for b in self.batches if b.extra is not None for key in b.extra.keys.tolist()]
        self.is_column = [
            c for b in self.batches for c in ([True] * b.num_passages if b.own_only is None else (~b.own_only).tolist())
        ]
        self.targets, self.positives, self.known, start = [], [], [], 0
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
            start += batch.num_passages
        for row, target in enumerate(self.targets):
            self.positives[row] = self.positives[row] | {self.passage_keys[target]}

    def loss(self) -> Tensor:
        """Return the mean over the queries, or of both directions."""
        forth = self._forth()
        return (forth + self._back()) / 2 if self.options.symmetric else forth

    def _forth(self) -> Tensor:
        columns = [i for i, is_column in enumerate(self.is_column) if is_column]
        texts = [*(self.passage_keys[i] for i in columns), *self.extra_keys]
        related = [[key in positives for key in texts] for positives in self.positives]
        groups = [
            _Columns(
                OTHER_SIDE,
                self.passage[columns],
                self.passage_guide[columns],
                texts[: len(columns)],
                [r[: len(columns)] for r in related],
            )
        ]
        if self.extra_keys:
            copies = [key in texts[:i] for i, key in enumerate(texts)][len(columns) :]
            masked = [[m or c for m, c in zip(row[len(columns) :], copies, strict=True)] for row in related]
            groups.append(_Columns(EXTRA, self.extra, self.extra_guide, self.extra_keys, masked))
        if self.options.same_side:
            # Queries of one text, or with a positive in common, are no negatives of each other.
            known = [{key, *keys} for key, keys in zip(self.query_keys, self.positives, strict=True)]
            is_related = [
                [any(known[i] & known[k] for k in self._of_text(j)) for j in range(len(known))] for i in range(len(known))
            ]
            groups.append(_Columns(SAME_SIDE, self.query, self.query_guide, self.query_keys, is_related))
        own = self.passage[self.targets]
        positive = (self.query * own).sum(1)
        cells = []
        for row, target in enumerate(self.targets):
            for place, key in enumerate(texts[: len(columns)]):
                is_sibling = key in self.positives[row] and key not in texts[:place] and key != self.passage_keys[target]
                if is_sibling:
                    cells.append((row, SIBLING, self.query[row] @ self.passage[columns[place]], self.known[row].get(key, {})))
        first_query = first_passage = 0
        for batch in self.batches:
            if batch.candidates is not None:
                values = {n: v.tolist() for n, v in batch.candidates.values.items()}
                pairs = zip(batch.candidates.query.tolist(), batch.candidates.passage.tolist(), strict=True)
                for i, (q, p) in enumerate(pairs):
                    score = self.query[first_query + q] @ self.passage[first_passage + p]
                    cells.append((first_query + q, CANDIDATE, score, {n: v[i] for n, v in values.items()}))
            first_query, first_passage = first_query + batch.num_queries, first_passage + batch.num_passages
        second_rows = self._second_rows(own, self.query_guide)
        return self._direction(self.query, positive, groups, cells, second_rows)

    def _back(self) -> Tensor:
        rows = self.passage[self.targets]
        own_keys = [self.passage_keys[target] for target in self.targets]
        # A query text is a positive of a passage if one of the queries of that text has it.
        is_positive = [
            [any(key in self.positives[k] for k in self._of_text(j)) for j in range(len(self.query_keys))] for key in own_keys
        ]
        groups = [_Columns(OTHER_SIDE, self.query, self.query_guide, self.query_keys, is_positive)]
        if self.options.same_side:
            columns = [i for i, is_column in enumerate(self.is_column) if is_column]
            texts = [self.passage_keys[i] for i in columns]
            related = [[key in positives for key in texts] for positives in self.positives]
            groups.append(_Columns(SAME_SIDE, self.passage[columns], self.passage_guide[columns], texts, related))
        cells = [
            (row, SIBLING, rows[row] @ self.query[column], {})
            for row in range(len(rows))
            for column, key in enumerate(self.query_keys)
            if is_positive[row][column] and key not in self.query_keys[:column] and key != self.query_keys[row]
        ]
        second_rows = self._second_rows(self.query, self.passage_guide[self.targets])
        return self._direction(rows, (rows * self.query).sum(1), groups, cells, second_rows)

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
        cells: list[tuple[int, int, Tensor, Mapping[str, float]]],
        second_rows: Tensor | None,
    ) -> Tensor:
        objective = self.options.objective
        columns = torch.cat([group.rows for group in groups])
        is_masked = torch.tensor([[m for g in groups for m in g.masked(row)] for row in range(len(rows))], device=rows.device)
        second = None
        if second_rows is not None:
            guides = columns if objective.second == "positive" else torch.cat([group.guides for group in groups])
            second = (second_rows @ guides.T).detach()
        names = sorted(self.batches[0].query_values)
        values = {name: torch.cat([b.query_values[name] for b in self.batches]).to(rows) for name in names}
        tile = Tile(
            scores_tP=torch.where(is_masked, FLOOR, rows @ columns.T),
            scale=self.scale.to(rows.dtype),
            positive_t=positive if objective.returns_positive else positive.detach(),
            kind_P=torch.cat([torch.full((len(g.rows),), g.kind, dtype=torch.int8, device=rows.device) for g in groups]),
            row_values=values,
            second_tP=second,
            progress=self.progress,
        )
        wanted = [cell for cell in cells if cell[1] == CANDIDATE or objective.wants_siblings]
        wanted.sort(key=lambda cell: cell[0])
        return _mean_loss(objective, tile, positive, wanted, values)


def _mean_loss(
    objective: Objective,
    tile: Tile,
    positive: Tensor,
    cells: list[tuple[int, int, Tensor, Mapping[str, float]]],
    values: Mapping[str, Tensor],
) -> Tensor:
    device = positive.device
    of_cells = sorted({name for *_, known in cells for name in known})
    statistics = objective.statistics(tile)
    parts = dict(
        statistics_tS=statistics,
        scale=tile.scale,
        positive_t=positive,
        cells=Cells(
            row_c=torch.tensor([row for row, *_ in cells], dtype=torch.int64, device=device),
            kind_c=torch.tensor([kind for _, kind, *_ in cells], dtype=torch.int8, device=device),
            score_c=torch.stack([score for *_, score, _ in cells]) if cells else positive[:0],
            values={n: torch.tensor([k.get(n, torch.nan) for *_, k in cells]).to(positive) for n in of_cells},
        ),
        values=values,
        progress=tile.progress,
    )
    if objective.batch_merges:
        of_rows = objective.batch_statistics(Rows(**parts))
        parts["batch"] = merge_all(of_rows[:, None], objective.batch_merges)[0]
    losses = objective.loss(Rows(**parts))
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


def _encode(plan: Plan) -> Tensor:
    """Return the embeddings of one rank's rows in one graph, with the draws of that rank's chunks."""
    row_of_place: dict[int, Tensor] = {}
    for chunk in plan.chunks:
        if len(chunk.rows):
            with_graph = not chunk.tower.is_frozen
            row_of_place |= dict(zip(chunk.places.tolist(), encode_chunk(chunk, with_graph=with_graph), strict=True))
    return torch.stack([row_of_place[place] for place in plan.place_n.tolist()]) if row_of_place else torch.empty(0, 0)
