"""The moving average: its closed form, the way in and back bit by bit, shards of FSDP2, and what survives a restart."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from trainer.ema import EmaSettings, NoAverage, WeightAverage, build_average
from trainer.errors import InputError

DECAY, STEPS = 0.5, 6


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))  # rows that two ranks cannot share evenly


def move(module, step):
    """Change every trained parameter, as an optimizer would."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.1 * (step + 1) * (number + 1))


def averaged(module, steps=STEPS):
    average = WeightAverage(module, DECAY)
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
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for name, p in module.named_parameters()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


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
    before, kept = weights(module), average.state_dict()
    pointers = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="evaluation"), average.swapped_in():
        assert not same(weights(module), before)
        raise RuntimeError("in the evaluation")
    assert same(weights(module), before) and same(average.state_dict(), kept)
    assert [p.data_ptr() for p in module.parameters()] == pointers, "an optimizer holds the same tensors"


def test_only_what_is_trained_is_averaged():
    module = model()
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    average = averaged(module)
    assert average.state_dict().keys() == {"2.weight", "2.bias", "num_updates"}
    with average.swapped_in():
        assert torch.equal(module[0].weight, frozen)


def test_a_restart_goes_on_as_if_there_had_been_none():
    module = model()
    average = averaged(module, steps=3)
    state, before = average.state_dict(), weights(module)
    for step in range(3, STEPS):
        move(module, step)
        average.update()
    again = model()
    again.load_state_dict(before)
    resumed = WeightAverage(again, DECAY)
    resumed.load_state_dict(state)
    for step in range(3, STEPS):
        move(again, step)
        resumed.update()
    assert same(resumed.state_dict(), average.state_dict())


def sharded(rank, whole):
    """Return the weights that an evaluation under FSDP2 saw and used, the weights before and behind it, and the state."""
    module = model()
    fully_shard(module[0])
    fully_shard(module)  # the last layer: FSDP leaves it gathered behind a forward
    average = averaged(module)
    inputs = torch.ones(2, 3)
    before = weights(module)
    with torch.no_grad():
        module(inputs)
        assert not isinstance(module[2].weight, DTensor)
        with average.swapped_in():
            seen, output = weights(module), module(inputs)
        after = weights(module)
    state = average.state_dict()
    assert isinstance(state["0.weight"], DTensor)
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    other = WeightAverage(module, DECAY)
    other.load_state_dict(full if whole else state)
    reloaded = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in other.state_dict().items()}
    return seen, output, same(before, after), same(full, reloaded)


@pytest.mark.parametrize("whole", [True, False])
def test_shards_of_fsdp2_average_like_whole_weights(whole):
    plain = model()
    average = averaged(plain)
    with average.swapped_in(), torch.no_grad():
        wanted, wanted_output = weights(plain), plain(torch.ones(2, 3))
    for seen, output, came_back, reloaded in run_ranks(sharded, 2, whole):
        assert same(seen, wanted) and came_back and reloaded
        torch.testing.assert_close(output, wanted_output)


def test_no_average_swaps_nothing_and_says_what_is_missing():
    module, average = model(), build_average(model(), EmaSettings())
    assert isinstance(average, NoAverage) and average.state_dict() == {}
    average.update()
    with average.swapped_in():
        assert same(weights(module), weights(model()))
    average.load_state_dict({})
    with pytest.raises(ValueError, match=r"ema\.decay is not set"):
        average.load_state_dict(averaged(module).state_dict())


def test_what_cannot_be_averaged_is_one_sentence():
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match=r"ema\.decay=.* must lie between 0 and 1"):
            EmaSettings(decay=decay)
    with pytest.raises(InputError, match=r"weight is torch\.bfloat16, too coarse"):
        WeightAverage(model().bfloat16(), DECAY)
    module = model()
    state = averaged(module).state_dict()
    module[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"of other parameters: 0\.bias, 0\.weight"):
        WeightAverage(module, DECAY).load_state_dict(state)
