"""The guides from other trainers name arguments that these have, with their defaults, and settings of ours likewise."""

import ast
import importlib.util
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mining.job import MineJob
from trainer.job import TrainJob

DOCS, PEERS = Path(__file__).parents[2] / "docs", Path(sys.prefix) / "peers"
SOURCES = {
    "sentence-transformers": [
        "sentence_transformers/sentence_transformer/losses/cached_multiple_negatives_ranking.py",
        "sentence_transformers/sentence_transformer/losses/matryoshka.py",
        "sentence_transformers/sentence_transformer/training_args.py",
        "sentence_transformers/base/training_args.py",
        "sentence_transformers/util/hard_negatives.py",
        "transformers/training_args.py",
        "transformers/trainer_callback.py",
    ],
    "tevatron": ["tevatron/arguments.py", "transformers/training_args.py"],
    "flagembedding": [
        "FlagEmbedding/abc/finetune/embedder/AbsArguments.py",
        "FlagEmbedding/finetune/embedder/decoder_only/base/arguments.py",
        "transformers/training_args.py",
    ],
}
# Named in first columns, and no arguments: modules, values, classes; and a script that the package does not bring.
OTHERS = {"faiss_retriever", "tevax", "dot_score", "cos_sim", "input_file", "output_file", "candidate_pool", "range_for_sampling"}
OTHERS |= {"negative_number", "use_gpu_for_searching", "embedder_query_max_length", "embedder_passage_max_length", "patience"}
OTHERS |= {"threshold", "warmup_ratio"}  # the last of the transformers that FlagEmbedding asks for


def source(path):
    package, _, rest = path.partition("/")
    for peer in ("tevatron", "FlagEmbedding"):
        if package == peer and not (PEERS / peer).is_dir():
            pytest.skip(f"{peer} is not installed")
        if package == peer:
            return PEERS / peer / path
    return Path(importlib.util.find_spec(package).origin).parent / rest


def arguments(path):
    """Return the arguments of all classes and functions of a file, with the text of their defaults."""
    found = {}
    for node in ast.walk(ast.parse(source(path).read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            given = {word.arg: word.value for word in getattr(node.value, "keywords", [])}
            found[node.target.id] = ast.unparse(given.get("default", node.value))
        if isinstance(node, ast.FunctionDef):
            names = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            found |= {name.arg: "" for name in [*node.args.args, *node.args.kwonlyargs]}
            found |= {name.arg: ast.unparse(default) for name, default in zip(names, node.args.defaults, strict=True)}
    return found


def rows(page):
    """Yield the first two columns of the rows of a page's tables."""
    for line in (DOCS / f"from-{page}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and not set(cells[1]) <= set("- :"):
            yield cells[1], cells[2]


def with_default(cell):
    """Return (name, default) of each `name` (default) in a cell whose default is a value."""
    return [(name, text) for name, text in re.findall(r"`([a-z_.]+)` \(([^)]+)\)", cell) if re.match(r'["\d]', text)]


@pytest.mark.parametrize("page", SOURCES)
def test_every_argument_of_theirs_is_there_with_its_default(page):
    theirs = {}
    for path in SOURCES[page]:
        theirs = arguments(path) | theirs
    cells = [cell for cell, _ in rows(page)]
    codes = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    names = {name for code in codes for name in re.findall(r"^[a-z0-9_]+|(?<=[(, ])[a-z]+_[a-z_]+", code)}
    assert len(names) > 25 and sorted(names - theirs.keys() - OTHERS) == []
    defaults = [pair for cell in cells for pair in with_default(cell) if pair[0] not in OTHERS]
    assert len(defaults) >= 4
    assert [(n, text) for n, text in defaults if float_or_text(theirs[n]) != float_or_text(text)] == []


@pytest.mark.parametrize("page", SOURCES)
def test_every_setting_of_ours_is_there_with_its_default(page):
    jobs = asdict(TrainJob()) | asdict(MineJob())
    ours = {f"{name}.{key}": str(v) for name, keys in jobs.items() for key, v in keys.items()}
    cells = [cell for row in rows(page) for cell in row]
    named = {name for cell in cells for name in re.findall(r"`([a-z]+\.[a-z_]+)[ `]", cell)}
    assert len(named) > 15 and sorted(named - ours.keys()) == []
    defaults = [pair for cell in cells for pair in with_default(cell) if pair[0] in ours]
    assert defaults and [(n, text) for n, text in defaults if float_or_text(ours[n]) != float_or_text(text)] == []


def float_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text.strip("'\"")
