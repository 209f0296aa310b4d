"""The learning rate's factor at every step, as transformers has it."""

import pytest
import torch
from transformers import get_scheduler

from trainer.job import OptimSettings
from trainer.optim import FALLS, build_schedule


@pytest.mark.parametrize("schedule", FALLS)
def test_the_schedule_is_that_of_transformers_to_the_last_bit(schedule):
    for num_steps in (1, 2, 7, 100, 333):
        for share in (0.0, 0.1, 0.34, 1.0):
            ours = build_schedule(OptimSettings(schedule=schedule, warmup_share=share), num_steps)
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.empty(1))])
            warmup = round(share * num_steps)
            theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps).lr_lambdas[0]
            assert [ours(step) for step in range(num_steps)] == [theirs(step) for step in range(num_steps)]
