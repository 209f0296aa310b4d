"""Which cells are masked: against comparisons one by one, and in memory that grows with rows and texts, not with pairs."""

import pytest
import torch
from torch.nn.functional import normalize, softplus

from gradcache import Batch, InfoNCE, LossOptions, NoSync, Temperature, Tower, cached_step
from gradcache.directions import count_masked, directions
from gradcache.exchange import Counts, Keys
from gradcache.field import Field, Pools
from gradcache.masks import Masks, Pairing, first_columns, first_of, relate
from gradcache.ragged import Ragged
from gradcache.terms import Source
from tests.gradcache.named import NAMED
from tests.sizes import Sizes

SCALE = 5.0


def ragged(lists: list[list[int]]) -> Ragged:
    values = torch.tensor([value for own in lists for value in own], dtype=torch.int64)
    return Ragged(values, torch.tensor([len(own) for own in lists], dtype=torch.int64))


def random_lists(num_rows: int, num_keys: int, generator) -> list[list[int]]:
    """Return lists of 0 to 3 keys, equal ones among them, also negative and very large ones."""
    counts = torch.randint(0, 4, (num_rows,), generator=generator).tolist()
    keys = torch.randint(-(2**62), 2**62, (num_keys,), generator=generator)
    return [keys[torch.randint(num_keys, (count,), generator=generator)].tolist() for count in counts]


@pytest.mark.parametrize("seed", range(8))
def test_related_cells_are_those_with_a_key_in_common(seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_columns = int(torch.randint(0, 9, (), generator=generator)), 11
    rows, columns = random_lists(num_rows, 7, generator), random_lists(num_columns, 7, generator)
    texts = torch.randint(6, (num_columns,), generator=generator)
    first = first_columns(texts)
    assert first.tolist() == [texts.tolist().index(text) for text in texts.tolist()]
    for window in (range(0, num_columns), range(3, 9), range(5, 5)):
        (related,) = relate([Pairing(ragged(rows), ragged(columns), first, window)])
        assert related.repeated.tolist() == [c - window.start for c in window if int(first[c]) != c]
        # What any column of a text has, its first column has.
        known = {c: {k for j in range(num_columns) if texts[j] == texts[c] for k in columns[j]} for c in window}
        for part in (slice(0, num_rows), slice(num_rows // 3, num_rows // 2), slice(0, 0)):
            row, column = related.cells(part)
            assert len(row) == len(column) == related.num_cells(part)
            wanted = {
                (r - part.start, c - window.start)
                for r in range(part.start, part.stop)
                for c in window
                if int(first[c]) == c and set(rows[r]) & known[c]
            }
            assert set(zip(row.tolist(), column.tolist(), strict=True)) == wanted
            assert row.tolist() == sorted(row.tolist())


@pytest.mark.parametrize("num_columns", [0, 1, 2, 500])
def test_the_first_column_of_a_text_is_the_one_that_a_search_finds(num_columns):
    keys = torch.randint(-90, 90, (num_columns,), generator=torch.Generator().manual_seed(num_columns)) * 2**55
    assert first_columns(keys).tolist() == first_of(keys, keys).tolist() == [keys.tolist().index(key) for key in keys.tolist()]


def test_masks_put_groups_of_columns_side_by_side():
    first = torch.arange(3)
    one, other = relate(
        [
            Pairing(ragged([[1], [2]]), ragged([[1], [2], [1, 2]]), first, range(3)),
            Pairing(ragged([[], [4]]), ragged([[4], [], []]), first, range(3)),
        ]
    )
    masks = Masks(torch.zeros(0, dtype=torch.int64), [(0, one), (3, other)])
    cells = [tuple(cell) for cell in torch.stack(masks.cells(slice(0, 2))).T.tolist()]
    assert sorted(cells) == [(0, 0), (0, 2), (1, 1), (1, 2), (1, 3)]
    assert masks.num_cells(slice(0, 2)) == 5
    assert torch.stack(masks.cells(slice(1, 2))).T.tolist() == [[0, 1], [0, 2], [0, 3]]


def field_of(query_keys, target_keys, queries_travel):
    """Return what one process knows of queries and their passages, with embeddings of one component."""
    num_rows = len(query_keys)
    every = torch.arange(num_rows)
    rows = Source(torch.zeros(num_rows, 1))
    return Field(
        batch=Batch(
            towers=[Tower(encode=lambda x: x, lengths=torch.ones(2 * num_rows, dtype=torch.int64), load=lambda x: x)],
            num_queries=num_rows,
            keys=torch.cat([query_keys, target_keys]),
            target=every,
            positive_keys=target_keys[:, None],
        ),
        options=LossOptions(objective=InfoNCE(), symmetric=True, same_side=True),
        pools=Pools(
            query=rows,
            target=rows,
            passage=rows,
            every_passage=rows,
            extra=None,
            travelled=dict.fromkeys(("queries", "targets", "passages"), rows),
        ),
        keys=Keys(
            passage_P=target_keys,
            extra_X=target_keys[:0],
            query_Q=query_keys,
            target_Q=target_keys,
            positives=Ragged.of_table(target_keys[:, None]),
            hidden=Ragged(target_keys[:0], torch.zeros_like(target_keys)),
            values_QV=torch.zeros(num_rows, 1),
        ),
        counts=Counts(queries=[num_rows], passages=[num_rows], extra=[0], positives=[num_rows], hidden=[0]),
        rank=0,
        queries_travel=queries_travel,
        second_view=None,
    )


@pytest.mark.parametrize("queries_travel", [False, True])
@pytest.mark.parametrize(
    "num_rows, num_query_texts, num_labels",
    [(4096, 1, 1), (65_536, 65_536, 2), (65_536, 1, 1)],
    ids=["equal texts", "two labels", "very many equal texts"],
)
def test_what_masks_hold_grows_with_rows_and_texts(num_rows, num_query_texts, num_labels, queries_travel):
    query_keys = torch.arange(num_rows) % num_query_texts
    target_keys = 10**6 + torch.arange(num_rows) % num_labels
    field = field_of(query_keys, target_keys, queries_travel)
    with Sizes() as sizes:
        there, again = directions(field)
        count_masked(field, there)
    # Of each of four groups the host reads where the entries and the cells of every row begin, all at once.
    assert sizes.largest_bytes <= 8 * (4 * 2 * (num_rows + 1) + 4), sizes.of_largest
    assert sizes.num_values <= 1000 * num_rows
    if num_labels == 2:
        ((_, related), _) = again.masks.related
        assert related.num_cells(slice(0, num_rows)) == num_rows**2 // 2, "pairs are counted, not listed"
        row, column = related.cells(slice(100, 103))
        assert len(row) == 3 * num_rows // 2 and column[0] == 0 and column[-1] == num_rows - 2


# Where all positives count, each of a label's queries is one of them: half the matrix are cells.
@pytest.mark.parametrize("name, num_queries", [("info_nce", 4096), ("info_nce_multi", 1024)])
def test_a_loss_over_two_labels_is_the_plain_one(name, num_queries):
    torch.manual_seed(0)
    query, label = (normalize(torch.randn(n, 8).double(), dim=1) for n in (num_queries, 2))
    of_query = torch.arange(num_queries) % 2
    rows = torch.cat([query, label[of_query]]).requires_grad_()
    keys = torch.cat([torch.arange(num_queries), 10**6 + of_query])
    tower = Tower(encode=lambda x: x, lengths=torch.ones(len(rows), dtype=torch.int64), load=lambda chosen: rows[chosen])
    batch = Batch(
        towers=[tower],
        num_queries=num_queries,
        keys=keys,
        target=torch.arange(num_queries),
        positive_keys=keys[num_queries:, None],
    )
    with Sizes() as sizes:
        found = cached_step(
            batch,
            loss=LossOptions(objective=NAMED[name], symmetric=True),
            temperature=Temperature(1 / SCALE).double(),
            sync=NoSync(),
            group=None,
            chunk_tokens=len(rows),
            keep_graphs="all",
            seed=0,
            step=0,
        )
    plain = rows.detach().clone().requires_grad_()
    score = SCALE * plain[:num_queries] @ plain[num_queries : num_queries + 2].T
    own, other = score[torch.arange(num_queries), of_query], score[torch.arange(num_queries), 1 - of_query]
    negatives = torch.stack([score[of_query != which, which].logsumexp(0) for which in range(2)])[of_query]
    back = softplus(negatives - own)
    if name == "info_nce_multi":
        back = torch.stack([softplus(negatives[which] - score[of_query == which, which]).mean() for which in range(2)])
    wanted = (softplus(other - own).mean() + back.mean()) / 2
    assert found.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(wanted, plain)
    torch.testing.assert_close(rows.grad[:num_queries], gradient[:num_queries], rtol=1e-6, atol=1e-10)
    # Copies of a text share what the plain formula gives to the first two.
    labels = torch.stack([rows.grad[num_queries:][of_query == which].sum(0) for which in range(2)])
    torch.testing.assert_close(labels, gradient[num_queries : num_queries + 2], rtol=1e-6, atol=1e-10)
    if name == "info_nce":
        assert sizes.largest_bytes <= 1.5 * 8 * num_queries**2, sizes.of_largest  # the scores themselves
