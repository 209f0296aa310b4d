"""A step of packed chunks: the exact gradient, no padding counted, and halves that are packed as well."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from gradcache import DDPSync, InfoNCE, LossOptions, NoSync, Temperature, cached_step, reference_step
from gradcache.budget import measure_graphs
from gradcache.plan import plan_encoding
from tests.gradcache.test_step import TinyEncoder, make_batch, named
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

OPTIONS = {"loss": LossOptions(objective=InfoNCE()), "chunk_tokens": 40, "seed": 3, "step": 1}


class Unpacking(TinyEncoder):
    """Takes packed rows, and refuses others."""

    def forward(self, inputs):
        lengths = inputs["starts"].diff()
        assert int(lengths.max()) <= inputs["longest"] and int(lengths.sum()) == len(inputs["input_ids"])
        ids = pad_sequence(inputs["input_ids"].split(lengths.tolist()), batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return super().forward({"input_ids": ids, "attention_mask": mask})


def packed(rank, num_queries, encoder):
    """The batch of the other tests, whose chunks come without padding."""
    batch = make_batch(rank, num_queries, [encoder])
    tower = batch.towers[0]

    def load(rows):
        padded = tower.load(rows)
        lengths = padded["attention_mask"].sum(1)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        ids = padded["input_ids"][padded["attention_mask"].bool()]
        return {"input_ids": ids, "starts": starts, "longest": int(lengths.max())}

    return replace(batch, towers=[replace(tower, load=load, is_packed=True)])


def step_of(rank, rows, dropout):
    encoder, temperature = Unpacking(0, dropout).train(), Temperature(0.1, learnable=True)
    called = DistributedDataParallel(encoder, broadcast_buffers=False) if len(rows) > 1 else encoder
    group, sync = (dist.group.WORLD, DDPSync(called)) if len(rows) > 1 else (None, NoSync())
    batch = packed(rank, rows[rank], called)
    result = cached_step(batch, temperature=temperature, sync=sync, group=group, keep_graphs=1, **OPTIONS)
    return result, named([encoder], temperature)


@pytest.mark.parametrize("rows", [(5,), (5, 3), (2, 0, 7)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_of_packed_chunks_are_those_of_one_graph(rows, dropout):
    encoder, temperature = Unpacking(0, dropout).train(), Temperature(0.1, learnable=True)
    batches = [packed(rank, n, encoder) for rank, n in enumerate(rows)]
    wanted = reference_step(batches, temperature=temperature, **OPTIONS)
    gradients = named([encoder], temperature)
    for result, found in run_ranks(step_of, len(rows), rows, dropout) if len(rows) > 1 else [step_of(0, rows, dropout)]:
        assert_same_gradients(found, gradients)
        assert result.loss == pytest.approx(wanted, rel=1e-6) and result.num_padded_tokens == result.num_tokens


def test_without_dropout_packing_changes_no_gradient():
    encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)
    reference_step([make_batch(0, 5, [encoder])], temperature=temperature, **OPTIONS)
    result, found = step_of(0, (5,), 0.0)
    assert result.num_chunks > 2
    assert_same_gradients(found, named([encoder], temperature))


def test_the_parts_of_a_packed_chunk_count_their_tokens_and_a_probe_measures_them():
    tower = packed(0, 7, Unpacking(0, 0.0)).towers[0]
    (whole,) = plan_encoding([tower], 10**6, 0, 0, 0).chunks
    halves = whole.halves()
    assert [len(half.rows) for half in halves] == [-(-len(whole.rows) // 2), len(whole.rows) // 2]
    assert sum(half.num_padded_tokens for half in halves) == whole.num_padded_tokens == int(whole.lengths.sum())
    assert measure_graphs(tower).of(whole.num_padded_tokens, 11) > 0
    most = plan_encoding([tower], 10**6, 0, 0, 0, num_chunks=[3]).chunks
    assert len(most) == 3 and sum(chunk.num_padded_tokens for chunk in most) == whole.num_padded_tokens
