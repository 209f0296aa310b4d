"""An evaluation where the encoder lives on a GPU: searched there, with the figures of the full matrix, TF32 or not."""

import dataclasses

import pytest
import torch

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.test_evaluate import coarse, on_the_full_matrix
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_dataset
from trainer.encoder import topk
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import numerics
from trainer.evaluate import evaluate

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_dataset(folder / "data", num_queries=300)
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def evaluated(root, place, embed=None):
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    if embed is not None:
        encoder.forward = embed
    world = dataclasses.replace(world_of(), device=torch.device("cuda", 0))
    return evaluate(world, data, "test", encoder.cuda(), tokenizer, traits, place)


def test_the_figures_are_those_of_the_full_matrix_ties_included(root, tmp_path):
    assert evaluated(root, tmp_path / "a") == pytest.approx(on_the_full_matrix(root), abs=0.01)
    assert evaluated(root, tmp_path / "b", coarse) == on_the_full_matrix(root, coarse)


def test_scores_have_all_bits_where_training_goes_by_tf32(tf32):
    query_QD, passage_ND = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).numpy() for n in (33, 5000))
    rough = topk.top_k(query_QD, passage_ND, 20, device="cuda")[0]
    assert torch.backends.cuda.matmul.allow_tf32
    whole = (torch.from_numpy(query_QD).double() @ torch.from_numpy(passage_ND).double().T).topk(20).values
    assert abs(torch.from_numpy(rough) - whole).max() < 1e-4  # by TF32 some hundredths


def test_tf32_and_the_device_keep_shards_apart(root):
    encoder, *_ = load_encoder(ModelSettings(name=str(root / "encoder")))
    on_cpu, plain = numerics(encoder), numerics(encoder.cuda())
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert on_cpu != plain != numerics(encoder) and plain["device"] == torch.cuda.get_device_name()
        assert numerics(encoder.cpu()) == on_cpu, "a CPU has no TensorFloat-32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
