"""The page on losses names every objective and parameter, and its worked example is right and trains."""

import importlib
import re

import pytest
import torch
from torch.nn.functional import normalize

from gradcache import OBJECTIVES, LossOptions, contrastive_loss, find_objective, parameters_of
from gradcache.testing import prove
from tests.docs.pages import ROOT, save_example
from tests.gradcache.objectives import plain

PAGE = ROOT / "docs" / "objectives.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module of the worked example, under the name that the page gives it."""
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(save_example(PAGE, tmp_path))


def test_every_name_and_parameter_is_in_the_table():
    table = TEXT.partition("## The published losses")[2].partition("## ")[0]
    words = set(re.findall(r"`(\w+)", table))
    assert OBJECTIVES.keys() <= words and parameters_of(OBJECTIVES["info_nce"].make).keys() <= words


def test_the_worked_example_is_proven_and_is_its_formula(example):
    prove(example.Hinge())
    prove(find_objective("my_losses:Hinge", {"margin": 0.3}))
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(num, 4).double(), dim=1).requires_grad_() for num in (5, 9))
    wanted = plain.hinge(query, passage, 1.0)
    gradients = torch.autograd.grad(wanted, (query, passage))
    found = contrastive_loss(query, passage, temperature=1.0, options=LossOptions(objective=example.Hinge()), group=None)
    assert found.item() == pytest.approx(wanted.item()) and wanted > 0
    for ours, theirs in zip(torch.autograd.grad(found, (query, passage)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="has margin=3; expected a number from 0 to 2"):
        find_objective("my_losses:Hinge", {"margin": 3})
