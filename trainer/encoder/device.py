"""Chooses the device that encodes: the one that the job asks for, else a GPU, else the CPU."""

import torch

from trainer.encoder.settings import check_device
from trainer.errors import InputError


def choose_device(asked: str | None, local_rank: int = 0) -> torch.device:
    """Return the device of a rank: the one asked for, else its GPU, else the CPU; raises InputError where it is not there.

    local_rank: among those of its machine, who share its GPUs out; "cuda:N" is the one GPU for all of them.
    """
    num_gpus = torch.cuda.device_count()
    if asked is None:
        asked = "cuda" if num_gpus else "cpu"
    check_device(asked)
    kind, _, number = asked.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if num_gpus == 0 or (number and int(number) >= num_gpus):
        there = ", ".join(["cpu", *(f"cuda:{gpu}" for gpu in range(num_gpus))])
        raise InputError(f'encode.device="{asked}" (--device) is not there; torch sees {there} on this machine')
    return torch.device("cuda", int(number) if number else local_rank % num_gpus)
