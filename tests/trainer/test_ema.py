"""The moving average: its closed form, the way in and back bit by bit. Shards and restarts are in test_checkpoint.py."""

import pytest
import torch
from torch import nn

from tests.trainer.worlds import world_of
from trainer.backends import parallelize
from trainer.ema import NoAverage, WeightAverage, build_average
from trainer.errors import InputError
from trainer.job import EmaSettings, OptimSettings, ParallelSettings, TrainJob

DECAY, STEPS = 0.5, 6


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))


def parallel(module):
    return parallelize(module, world_of(), ParallelSettings(), OptimSettings())


def move(module, step):
    """Change every trained parameter, as an optimizer would."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.1 * (step + 1) * (number + 1))


def averaged(module, steps=STEPS):
    average = WeightAverage(parallel(module), DECAY)
    for step in range(steps):
        move(module, step)
        average.update()
    return average


def closed_form(steps=STEPS):
    """The weighted sum over all that the parameters have been."""
    module = model()
    total = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    for step in range(steps):
        move(module, step)
        decay = min(DECAY, (2 + step) / (11 + step))
        total = {name: decay * total[name] + (1 - decay) * p.detach().double() for name, p in module.named_parameters()}
    return total


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def held(average):
    return {f.name: f.values.clone() for f in average.fragments()}


def test_the_average_is_the_closed_form_and_not_the_weights():
    module = model()
    average = averaged(module)
    last = weights(module)
    with average.swapped_in():
        found = weights(module)
    for name, wanted in closed_form().items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found[name], last[name])


def test_weights_come_back_bit_by_bit_also_after_an_error():
    module = model()
    average = averaged(module)
    before, kept = weights(module), held(average)
    pointers = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="evaluation"), average.swapped_in():
        assert not same(weights(module), before)
        raise RuntimeError("in the evaluation")
    assert same(weights(module), before) and same(held(average), kept)
    assert [p.data_ptr() for p in module.parameters()] == pointers, "an optimizer holds the same tensors"


def test_only_what_is_trained_is_averaged():
    module = model()
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    average = averaged(module)
    assert held(average).keys() == {"average.2.weight", "average.2.bias"}
    with average.swapped_in():
        assert torch.equal(module[0].weight, frozen)


def test_no_average_swaps_nothing():
    module = model()
    average = build_average(parallel(module), EmaSettings())
    assert isinstance(average, NoAverage) and held(average) == {}
    average.update()
    with average.swapped_in():
        assert same(weights(module), weights(model()))


def test_what_cannot_be_averaged_is_one_sentence():
    with pytest.raises(InputError, match=r"weight is torch\.bfloat16, too coarse"):
        WeightAverage(parallel(model().bfloat16()), DECAY)
    with pytest.raises(InputError, match=r"set zero2 or fsdp2"):
        TrainJob(ema=EmaSettings(decay=0.9), parallel=ParallelSettings(backend="zero3"))
