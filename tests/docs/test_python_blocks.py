"""Each function of negpool that an example calls takes what the example gives it; docs/python.md really runs, elsewhere."""

import ast
import inspect
import operator
import re

import pytest

import negpool
from launch.jobfile import SECTIONS
from launch.options import MINING
from tests.docs.pages import PAGES, ROOT, blocks
from tests.docs.test_commands import check_name


def check(text):
    """Raise where an example calls a function that is not there, or gives it an argument or a setting that it does not take."""
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("negpool."):
            function = operator.attrgetter(ast.unparse(call.func).removeprefix("negpool."))(negpool)
            signature, given = inspect.signature(function), {word.arg: word.value for word in call.keywords if word.arg}
            signature.bind(*call.args, **given)
            options = MINING.keys() if function is negpool.mine_negatives else set()
            for name in given.keys() - signature.parameters.keys() - options:
                assert name in SECTIONS, f"there is no section {name}"
                for key in getattr(given[name], "keys", []):
                    check_name(f"{name}.{ast.literal_eval(key)}")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "python.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_negpool_takes_what_examples_give_it(page):
    for block in blocks(page):
        if block.language == "python":
            check(block.text)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("too many positional arguments", "negpool.train(1, 2, 3, 4)"),
        ("there is no setting optim.rate", "negpool.train(optim={'rate': 1})"),
        ("there is no section range_max", "negpool.train(range_max=3)"),
        ("there is no section optimiser", "negpool.train(optimiser={'lr': 1})"),
        ("has no attribute 'nosuch'", "negpool.nosuch()"),
        ("missing a required argument: 'texts'", "negpool.encode('model')"),
    ],
)
def test_an_example_that_cannot_work_fails(said, text):
    check("import negpool\nnegpool.train('model', 'data', optim={'lr': 1})")
    with pytest.raises((AssertionError, AttributeError, TypeError), match=re.escape(said)):
        check(text)
