"""When DistributedDataParallel reduces its buckets of gradients, noted by a hook that reduces as DDP does by itself.

The hook changes no bit of a gradient: the same factor, the same sum, on the same buffers.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradcache.spans import Recorder, TimedSpan

BUCKET = "bucket"  # the name of their spans


def note_buckets(module: DistributedDataParallel, recorder: Recorder) -> None:
    """Note each bucket's reduction, from its last gradient to its sum, from here on. Once for a module, which keeps the hook."""
    group = module.process_group

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        noted = recorder.begin_beside(BUCKET, "all_reduce", buffer.nbytes)
        # DDP multiplies, and does not divide: for three ranks that rounds differently.
        buffer.mul_(1.0 / group.size())

        def finish(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            noted.finish()
            return future.value()[0]

        return dist.all_reduce(buffer, group=group, async_op=True).get_future().then(finish)

    module.register_comm_hook(None, reduce)


def split_reductions(buckets: Sequence[TimedSpan], backward_end_s: float) -> tuple[float, float]:
    """Return the seconds from the last bucket's start to the end of a backward, which the step waits for, and those before in
    which buckets were reduced beside the backward.
    """
    if not buckets:
        return 0.0, 0.0
    in_order = sorted(buckets, key=lambda bucket: bucket.begin_s)
    last_s, hidden_s, until_s = in_order[-1].begin_s, 0.0, 0.0
    for bucket in in_order[:-1]:
        end_s = min(bucket.end_s, last_s)
        hidden_s += max(0.0, end_s - max(bucket.begin_s, until_s))
        until_s = max(until_s, end_s)
    return backward_end_s - last_s, hidden_s
