"""An objective that torch.compile has fused gives what plain torch gives; one that does not compile runs, and says so."""

import pytest
import torch
from torch.nn.functional import normalize

from gradcache import InfoNCE, compiled
from gradcache.masks import Masks, Pairing, first_columns, relate
from gradcache.matrix import Matrix
from gradcache.objectives import CACR, AdaptiveMargins, Sigmoid
from gradcache.objectives.tile import trained_parameters
from gradcache.ragged import Ragged
from gradcache.tiles import Tiles


def matrix(progress):
    torch.manual_seed(0)
    rows, columns = (normalize(torch.randn(n, 6).double(), dim=1) for n in (7, 12))
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 9, 10])  # one text twice
    row_keys, column_keys = Ragged.of_table(torch.arange(7)[:, None]), Ragged.of_table(keys[:, None])
    (related,) = relate([Pairing(row_keys, column_keys, first_columns(keys), range(12))])
    return Matrix(
        row_RD=rows,
        column_PD=columns,
        kind_P=torch.zeros(12, dtype=torch.int8),
        masks=Masks(related.repeated, [(0, related)]),
        scale=torch.tensor(4.0).double(),
        positive_R=(rows * columns[:7]).sum(1),
        second=(columns[:7], columns),
        progress=progress,
    )


def gradients(objective, compiles, progress, tile_rows):
    tiles = Tiles(matrix(progress), objective, tile_rows, may_fuse=False, compiles=compiles)
    found = tiles.gradients(lambda rows, statistics: torch.cos(statistics))
    values = [found.row_RD, found.column_PD, found.scale, *found.parameters]
    return [*values, *([found.positive_R] if objective.returns_positive else [])]


@pytest.mark.parametrize(
    "objective",
    [InfoNCE(positives="mean"), InfoNCE(hardest=3), CACR(), AdaptiveMargins(), Sigmoid(bias=-1.0).double()],
    ids=lambda objective: type(objective).__name__,
)
def test_what_is_compiled_gives_the_same_gradients(objective, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # all of it but the code for a device, which takes a minute
    for progress, tile_rows in ((0.0, None), (0.5, 3), (1.0, 2)):
        wanted, found = (gradients(objective, compiles, progress, tile_rows) for compiles in (False, True))
        assert all(b.any() for b in wanted[:2])
        assert len(found) == 3 + len(trained_parameters(objective)) + objective.returns_positive
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not [record for record in caplog.records if record.name.startswith("gradcache")]


def test_what_does_not_compile_runs_in_plain_torch_and_says_so_once(monkeypatch, caplog):
    def refuse(*args):
        raise torch._dynamo.exc.Unsupported("it looks at numbers")

    monkeypatch.setattr(compiled, "_compiled", lambda backend: refuse)
    monkeypatch.setattr(compiled, "_told_of", set())
    for _ in range(2):
        found = gradients(AdaptiveMargins(), True, 0.5, None)
    for a, b in zip(found, gradients(AdaptiveMargins(), False, 0.5, None), strict=True):
        assert torch.equal(a, b)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("gradcache")] == [
        "AdaptiveMargins does not compile (it looks at numbers); it runs in plain torch, slower"
    ]
