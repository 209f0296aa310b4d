"""Compiled layers: the gradients of plain ones, dropout replayed, a bound on what is compiled, and a fall-back that is said."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gradients import assert_same_gradients, gradients_of
from tests.trainer.encoder.families import write_family
from trainer.encoder import compiled as compiled_module
from trainer.encoder.attention import packed_marker
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest

SHAPES = [(4, 4), (6, 12), (2, 20), (3, 1), (5, 2)]  # rows and columns of chunks, the first with as many as heads; …
SINGLE = [(1, 9), (1, 16), (1, 1)]  # … and of chunks of one row


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that draws before its first layer, and one that looks back only."""
    root = tmp_path_factory.mktemp("compiled")
    return {family: write_family(root / family, family) for family in ("bert", "qwen3")}


@pytest.fixture
def counter(monkeypatch):
    """Trace as ever, run what was traced as it is, and count it: generating C++ would take minutes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_module, "HOW", {"backend": counter, "dynamic": True})
    return counter


def load(folder, compiles=False, is_packed=False, **settings):
    encoder, *_ = load_encoder(ModelSettings(name=str(folder), pooling="mean", **settings))
    if compiles:
        encoder.compile_layers(is_packed)
    return encoder


def chunk(rows, columns, is_padded=True):
    """A chunk whose last row is shorter, or one of a single length, which has no mask."""
    ids = torch.randint(5, 15, (rows, columns), generator=torch.Generator().manual_seed(0))
    if not is_padded:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mask = torch.ones_like(ids)
    mask[-1, columns // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def packed(*lengths):
    """A chunk of rows without padding, one behind the other."""
    ids = torch.randint(5, 15, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {"input_ids": ids, "starts": starts, "longest": max(lengths)}


def encode(encoder, inputs, with_graph=False, seed=1):
    torch.manual_seed(seed)
    with torch.set_grad_enabled(with_graph):
        return encoder(inputs)


def step(encoder, chunks):
    """Encode chunks as a cached step does, without graph and then with one; return the embeddings of both."""
    found = []
    for number, inputs in enumerate(chunks):
        found.append(encode(encoder, inputs, seed=number))
    for number, inputs in enumerate(chunks):
        again = encode(encoder, inputs, with_graph=True, seed=number)
        weight = torch.randn(again.shape, generator=torch.Generator().manual_seed(number))
        (again * weight).sum().backward()
        found.append(again.detach())
    return found


def told(caplog):
    return [record.message for record in caplog.records if record.name == compiled_module.__name__]


@pytest.mark.parametrize(("family", "single"), [("bert", SINGLE), ("qwen3", [])])
def test_a_step_of_many_chunks_has_the_plain_gradients_and_few_compilations(folders, family, single, counter, caplog):
    plain, compiled = (load(folders[family], compiles, dropout=0.0) for compiles in (False, True))
    several = [chunk(*shape, is_padded=i % 2 == 0) for i, shape in enumerate(SHAPES)]
    bound = 4 if single else 2  # with and without graph; each again for a single row
    for chunks, count in ((several, 2), (several + [chunk(*shape) for shape in single], bound)):
        for found, wanted in zip(step(compiled, chunks), step(plain, chunks), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert_same_gradients(gradients_of(encoder=compiled), gradients_of(encoder=plain))
        assert counter.frame_count == count
    for encoder in (plain, compiled):
        encoder.eval()
    with torch.inference_mode():
        for inputs in several:
            assert torch.equal(compiled(inputs), plain(inputs))
    compiled.train()
    step(compiled, several)
    assert counter.frame_count == bound  # evaluation compiles nothing, and nothing is compiled anew behind it
    assert torch._dynamo.config.recompile_limit >= bound
    assert not told(caplog) and compiled.is_compiled
    assert weights_digest(compiled) == weights_digest(plain)


def test_packed_chunks_take_as_few_compilations(folders, counter, caplog):
    plain, compiled = (load(folders["bert"], compiles, is_packed=True, dropout=0.0) for compiles in (False, True))
    several = [packed(4, 4, 4, 4), packed(9, 3, 1), packed(7, 7, 2, 2, 2), packed(2, 1)]
    for chunks, count in ((several, 2), ([*several, packed(12), packed(2)], 4)):
        for found, wanted in zip(step(compiled, chunks), step(plain, chunks), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert_same_gradients(gradients_of(encoder=compiled), gradients_of(encoder=plain))
        assert counter.frame_count == count
    assert compiled.is_compiled and not told(caplog)


def test_the_flash_call_of_packed_rows_is_one_kind_of_input_whatever_they_are(folders, counter):
    layer = load(folders["bert"]).layers()[0]
    compiled = torch.compile(layer._call_impl, **compiled_module.HOW)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # without numbers, and on a GPU that is not there
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                fake = torch.empty(weight.shape, device="cuda", dtype=torch.bfloat16)
                module.register_parameter(name, torch.nn.Parameter(fake, requires_grad=False))
        for lengths in [(4, 4, 4, 4), (9, 3, 2), (12,), (2, 1)]:
            starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda")
            states = torch.empty(1, sum(lengths), 32, device="cuda", dtype=torch.bfloat16)
            told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths), "max_length_k": max(lengths)}
            with compiled_module.compiling_as_we_need():
                found = compiled(states, packed_marker(states.device), **told)
            assert found.shape == states.shape and found.device.type == "cuda"
    calls = [node.target for graph in counter.graphs for node in graph.graph.nodes if "flash" in str(node.target)]
    assert len(calls) == counter.frame_count == 1


def test_two_towers_share_what_is_compiled(folders, counter, tmp_path):
    encoder = load(folders["bert"], compiles=True, towers="two")
    for side in ("query", "passage"):
        step(encoder.side(side), [chunk(*shape) for shape in SHAPES[:2]])
    assert counter.frame_count == 2 and encoder.is_compiled


def test_a_seed_replays_compiled_dropout_and_plain_layers_draw_alike(folders, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "HOW", {"backend": "aot_eager", "dynamic": False})  # with decompositions of dropout
    encoder, inputs = load(folders["bert"], compiles=True), chunk(4, 9)
    found = encode(encoder, inputs)
    assert torch.equal(encode(encoder, inputs, with_graph=True), found)
    assert not torch.allclose(encode(encoder, inputs, seed=2), found, atol=1e-3)
    encoder._compiled.give_up("a test asks for it")
    torch.testing.assert_close(encode(encoder, inputs), found, rtol=0, atol=1e-5)


def test_what_does_not_compile_is_said_once_and_goes_on_without(folders, monkeypatch, caplog, tmp_path):
    def fail(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "HOW", {"backend": fail})
    plain, encoder = load(folders["bert"]), load(folders["bert"], compiles=True)
    plain._compiled = compiled_module.CompiledLayers(plain.model)  # draws as layers that did compile
    plain._compiled.give_up("a test asks for it")
    caplog.clear()
    chunks = [chunk(4, 9), chunk(2, 5)]
    for found, wanted in zip(step(encoder, chunks), step(plain, chunks), strict=True):
        assert torch.equal(found, wanted)
    (sentence,) = told(caplog)
    assert sentence.startswith("model.compile: the layers do not compile (") and "no compiler here" in sentence
    assert sentence.endswith("); they run in plain torch, slower")
    assert_same_gradients(gradients_of(encoder=encoder), gradients_of(encoder=plain))
    encoder.leave_compiled("")
    ours = load(folders["bert"])
    assert torch.equal(encode(encoder, chunks[0]), encode(ours, chunks[0]))  # our own draws again
    (tmp_path / "saved").mkdir()
    _, tokenizer, traits = load_encoder(ModelSettings(name=str(folders["bert"])))
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    assert weights_digest(load(tmp_path / "saved")) == weights_digest(plain)


def test_more_kinds_of_input_than_torch_compiles_are_said_once_and_a_step_stays_exact(folders, counter, caplog):
    encoder = load(folders["bert"], compiles=True)
    chunks = [chunk(4, 9), chunk(1, 9), chunk(1, 12), chunk(3, 5)]  # the second asks for a third compilation
    with torch._dynamo.config.patch(recompile_limit=2):
        found = step(encoder, chunks)
    assert not encoder.is_compiled and counter.frame_count == 2
    assert told(caplog) == [
        "model.compile: the layers do not compile (they meet more kinds of input than torch._dynamo.config.recompile_limit=2 "
        "allows); they run in plain torch, slower"
    ]
    for without, with_graph in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(with_graph, without, rtol=0, atol=1e-5)  # of the first one, compiled, and then plain
    assert not torch._dynamo.config.fail_on_recompile_limit_hit  # others who compile in this process are left alone
