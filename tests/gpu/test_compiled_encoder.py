"""Compiled layers on a GPU, by inductor: the gradients of plain ones, the same draws, and a bound on what is compiled."""

from dataclasses import replace

import pytest
import torch

from tests.gradients import gradients_of
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.encoder.test_compiled import chunk, encode, packed, step, told
from tests.trainer.test_compiling import job_of, lines
from tests.trainer.worlds import world_of
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.packed import packs
from trainer.job import PrecisionSettings
from trainer.train import train

pytestmark = pytest.mark.gpu
SEVERAL = {  # chunks of several rows, and …
    "packed": [packed(4, 4, 4, 4), packed(9, 3, 2), packed(7, 7, 5, 5, 3), packed(16, 2)],
    "padded": [chunk(4, 4, is_padded=False), chunk(6, 12), chunk(2, 20), chunk(3, 16, is_padded=False)],
}
SINGLE = {"packed": [packed(12), packed(20)], "padded": [chunk(1, 12), chunk(1, 20)]}  # … of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("compiled") / "encoder")


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def load(folder, dropout, compiles, kind):
    encoder, *_ = load_encoder(ModelSettings(name=str(folder), dropout=dropout))
    encoder.cuda()
    if kind == "packed" and not packs(encoder, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16):
        pytest.skip("needs a GPU that takes packed texts")
    if compiles:
        encoder.compile_layers(kind == "packed")
    return encoder


def on_gpu(inputs):
    return {name: values.cuda() if isinstance(values, torch.Tensor) else values for name, values in inputs.items()}


def apart(found, wanted):
    """How far apart two tensors are, of the length of one."""
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_compiled_gradients_are_the_plain_ones_by_few_compilations(folder, kind, caplog):
    plain, compiled = (load(folder, 0.0, compiles, kind) for compiles in (False, True))
    several, single = ([on_gpu(inputs) for inputs in chunks[kind]] for chunks in (SEVERAL, SINGLE))
    with torch.autocast("cuda", torch.bfloat16):
        for chunks, bound in ((several, 2), ([*several, *single], 4)):
            for found, wanted in zip(step(compiled, chunks), step(plain, chunks), strict=True):
                assert apart(found, wanted) < 0.02  # eight bits, once in every layer
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= bound
    found, wanted = (
        torch.cat([gradient.flatten() for gradient in gradients_of(encoder=encoder).values()]) for encoder in (compiled, plain)
    )
    assert wanted.norm() > 0 and apart(found, wanted) < 0.02
    assert compiled.is_compiled and not told(caplog)
    for encoder in (compiled, plain):
        encoder.eval()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert all(torch.equal(compiled(inputs), plain(inputs)) for inputs in several)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_seed_replays_compiled_dropout_and_plain_layers_draw_alike(folder, kind):
    encoder, inputs = load(folder, 0.3, True, kind), on_gpu(SEVERAL[kind][1])
    with torch.autocast("cuda", torch.bfloat16):
        found = encode(encoder, inputs)
        assert apart(encode(encoder, inputs, seed=2), found) > 0.1
        assert apart(encode(encoder, inputs, with_graph=True), found) < 0.02
        assert encoder.is_compiled
        encoder._compiled.give_up("a test asks for it")
        assert apart(encode(encoder, inputs), found) < 0.02


def test_a_run_on_a_gpu_compiles_before_its_first_step(tmp_path):
    write_tiny_dataset(tmp_path / "data")
    write_tiny_encoder(tmp_path / "encoder")
    job = replace(job_of(tmp_path, tmp_path / "run", True), precision=PrecisionSettings(encode="bf16"))
    world = replace(world_of(), device=torch.device("cuda", torch.cuda.current_device()))
    assert train(job, world).step == 2
    (event,) = [line for line in lines(job) if line.get("event") == "layers compiled"]
    assert event["compiled"] and event["time/compile_s"] > 0
    assert [line["compiled"] for line in lines(job) if "loss" in line] == [True, True]
