"""What a process takes of a GPU that another one uses, too; tests/gpu/test_memory_gpu.py shows it on one."""

from types import SimpleNamespace

import pytest
import torch

from gradcache.free import free_bytes
from trainer.encoder.gpu_share import GPU_SHARE, allocator_fraction, keep_to_share

GIB = 2**30


def test_both_sides_and_what_cuda_takes_beside_fit_together():
    for total in (16 * GIB, 80 * GIB):
        taken = [allocator_fraction(share, total) * total + 0.75 * GIB for share in (0.7, 0.3)]
        assert sum(taken) <= total * (1 + 1e-12)
    assert allocator_fraction(0.1, GIB) == 0.05, "even of a small one something is left"


def test_a_share_limits_the_allocator_and_nothing_else(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=75 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: limits.append(fraction))
    keep_to_share(torch.device("cuda"), {})
    keep_to_share(torch.device("cpu"), {GPU_SHARE: "0.3"})
    assert limits == []
    keep_to_share(torch.device("cuda"), {GPU_SHARE: "0.3"})
    assert limits == [pytest.approx(0.29)]


@pytest.mark.parametrize(
    ("free", "share", "wanted"),
    [(60, 1.0, 65), (60, 0.5, 35), (10, 0.5, 15), (0, 0.05, 0)],
    ids=["alone", "the other side has taken nothing yet", "the other side has taken most", "more than the share is taken"],
)
def test_what_is_free_is_within_the_share_and_counts_what_the_allocator_keeps(monkeypatch, free, share, wanted):
    """Of 80 GiB this process has reserved 10, of which 5 are in use."""
    for name, value in {
        "mem_get_info": (free * GIB, 80 * GIB),
        "memory_reserved": 10 * GIB,
        "memory_allocated": 5 * GIB,
        "get_per_process_memory_fraction": share,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == wanted * GIB
