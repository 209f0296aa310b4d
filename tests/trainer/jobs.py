"""A job of a few steps on the tiny data set, from which tests make theirs."""

from trainer.encoder.settings import ModelSettings
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.job import BatchSettings, CheckpointSettings, ChunkSettings, OptimSettings, TrainJob


def tiny_job(root, folder, steps):
    """Return a job on root/data by root/encoder, whose run is in a folder."""
    return TrainJob(
        run=RunSettings(folder=folder, trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder")),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=64, keep_graphs="all"),
        optim=OptimSettings(steps=steps, lr=1e-3),
        checkpoint=CheckpointSettings(every_steps=2),
        negatives=NegativesSettings(per_query=0),
    )
