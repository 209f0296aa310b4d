"""The guide to gradcache: each of its examples runs as it stands, those for several processes on two."""

import os
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState

from gradcache import LossOptions, contrastive_loss
from tests.docs.pages import ROOT, blocks
from tests.ranks import run_ranks
from tests.tiny import write_tiny_encoder

PAGE = ROOT / "docs" / "gradcache.md"
CODE = [block.text for block in blocks(PAGE) if block.language == "python"]
HUB_NAMES = ("bert-base-uncased", "all-MiniLM-L6-v2")


def code_with(word: str) -> str:
    """Return the one block that has a word."""
    (found,) = [text for text in CODE if word in text]
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("gradcache") / "encoder")


def run(code: str, names: dict | None = None) -> dict:
    names = {"__name__": "__main__"} if names is None else names
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_loop_learns(capsys):
    with warnings.catch_warnings(action="error"):
        run(code_with("step % 10"))
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_keys_and_positives_change_the_loss_as_the_page_says():
    found = run(code_with("digest_size"))
    assert found["temperature"].log_scale.grad != 0
    query, passage, temperature = found["query"], found["passage"], found["temperature"]
    assert found["loss"].item() != pytest.approx(
        contrastive_loss(query, passage, temperature=temperature, options=LossOptions(symmetric=True)).item()
    )


def test_all_of_it_is_equal_to_the_reference(capsys):
    code = code_with("Batch(")
    with warnings.catch_warnings(action="error"):
        run(code)
    said = capsys.readouterr().out
    assert "12 chunks, 83% encoded twice" in said and "equal to the reference" in said
    assert "transformers" not in code and "tokenizer" not in code


def test_an_own_objective_has_a_gradient_and_is_proved():
    found = run(code_with("class HardestHinge"))
    assert found["query"].grad.norm() > 0 and found["passage"].grad.norm() > 0
    run(code_with("prove("), found)


def on_rank(rank: int, code: str, folder: str, model: str) -> tuple[float, str]:
    """Run code as a launcher of two processes would; return a digest of the trained parameters, and what was trained."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    os.chdir(folder)
    trained = run(code)[model]
    return float(sum(p.detach().double().abs().sum() for p in trained.parameters())), type(trained).__name__


def local(code: str, encoder) -> str:
    for name in HUB_NAMES:
        code = code.replace(name, str(encoder))
    return code


# Ranks have different rows, so their parameters stay equal only if their gradients become one.
@pytest.mark.parametrize(
    ("word", "model", "kind"),
    [
        ("accelerator.prepare", "encoder", "DistributedDataParallel"),
        ("SentenceTransformerTrainer(", "model", "SentenceTransformer"),
    ],
)
def test_an_example_for_several_processes_trains_one_model_on_two(word, model, kind, encoder, tmp_path):
    first, second = run_ranks(on_rank, 2, local(code_with(word), encoder), str(tmp_path), model)
    assert first == second and first[1] == kind


def test_the_example_of_sentence_transformers_runs_alone(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    found = run(local(code_with("SentenceTransformerTrainer("), encoder))
    AcceleratorState._reset_state(reset_partial_state=True)  # which other tests of this process would find
    before = type(found["model"])(str(encoder))
    assert any(not torch.equal(a, b) for a, b in zip(found["model"].parameters(), before.parameters(), strict=True))
