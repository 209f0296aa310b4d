"""A whole job that leaves its precisions open, on a GPU: trained, evaluated and mined in half precision, and encoded once."""

import numpy as np
import pytest
import torch

from launch.jobfile import read_job
from launch.sides import keep_job, settled_by
from mining.alone import Alone
from mining.service import run_service
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.encoder.auto import takes_bf16
from trainer.handoff.manifest import open_version
from trainer.handoff.weights import newest_checkpoint
from trainer.train import train
from trainer.world import World

pytestmark = pytest.mark.gpu
JOB = ["batch.queries=16", "optim.steps=6", "optim.lr=1e-3", "negatives.per_query=0", "run.trackers=[]", "search.top_k=20"]
JOB += ["filter.relative_margin=off", "sample.num_negatives=5", "mine.bm25_top_k=0", "audit.min_recall=0.0"]


def stored(run):
    """Return by fingerprint how many embeddings a run keeps, and their types."""
    found, types = {}, set()
    for folder in (run / "shards").iterdir():
        arrays = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("shard-*/embeddings.npy"))]
        found[folder.name] = sum(map(len, arrays))
        types |= {str(array.dtype) for array in arrays}
    return found, types


def train_and_mine(root, device, *more):
    """Train and mine once; return the run folder, what was stored before and after the mining, and the types."""
    write_tiny_dataset(root / "data", num_queries=120)
    write_tiny_encoder(root / "encoder")
    own = [f"run.folder={root}/run", f"data.path={root}/data", f"data.cache={root}/cache", f"model.name={root}/encoder"]
    jobs, world = read_job(None, [*own, *JOB, *more]), World(0, 1, device, None, None)
    keep_job(jobs, remarks=settled_by(jobs, world))
    assert train(jobs.train, world).finished
    before, types = stored(root / "run")
    assert run_service(jobs.mine, Alone(), once=True) == "finished"
    after, more_types = stored(root / "run")
    return root / "run", before, after, types | more_types


def check(run, before, after, numbers):
    """Assert that a run and its miner computed in given numbers, and that the miner encoded its queries alone."""
    encode, products, stored_in, words = numbers
    assert newest_checkpoint(run).manifest["precision"] == {"encode": encode, "products": products}
    assert open_version(run / "negatives" / "v000001")["encode"] == {"dtype": encode, "stored": stored_in}
    lines = (run / "job.toml").read_text().splitlines()
    assert f'encode = "auto"  # {encode} on {words}' in lines and f'stored = "auto"  # {stored_in} on {words}' in lines
    added = after.keys() - before.keys()
    assert len(added) == 1 and after[added.pop()] < max(after.values()), "the passages of the last checkpoint were there"


def test_a_job_that_leaves_it_open_is_in_half_precision_and_encodes_once(tmp_path):
    device = torch.device("cuda", 0)
    if not takes_bf16(device):
        pytest.skip("needs a GPU with bfloat16")
    run, before, after, types = train_and_mine(tmp_path, device)
    check(run, before, after, ("bf16", "bf16", "fp16", torch.cuda.get_device_name(device)))
    assert types == {"float16"}
