"""What a command line names: a model, a run or a checkpoint, and the settings by which they are read without a job."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.jobfile import Override, name_of, read_job
from trainer.data.datasets import RetrievalData, open_data
from trainer.encoder.settings import EncodeSettings, ModelSettings
from trainer.encoder.source import refuse_no_name
from trainer.errors import InputError
from trainer.handoff.manifest import NotReadable, TornVersion
from trainer.handoff.rights import is_writable, unreadable
from trainer.handoff.settings import DataSettings
from trainer.handoff.weights import best_checkpoint, open_checkpoint

BM25 = "bm25"
READ = ("model", "data", "encode")  # sections that mean something without a run
ARGUMENTS = {"model.name": "the model", "data.path": "the data set"}  # settings that a command has for arguments
NEW = {"lora_rank": 0, "quantize": None, "projection": None, "towers": None}  # what training adds to a model, as it is left out
OF_TRAINING = (*NEW, "latents", "lora_alpha", "lora_dropout", "lora_targets", "dropout", "checkpoint_activations")


@dataclass(frozen=True)
class Reading:
    """How a command reads a model that is there, and its texts: the sections that a job would say it in."""

    data: DataSettings
    model: ModelSettings
    encode: EncodeSettings

    def open_data(self) -> RetrievalData:
        """Return the data set; raises InputError."""
        return open_data(self.data, {})


def read_settings(overrides: Sequence[Override], data: Path | None = None) -> Reading:
    """Return the settings that overrides make, of a data set named beside them; raises InputError for one without effect."""
    for override in overrides:
        name = name_of(override)
        section, _, key = name.partition(".")
        if name in ARGUMENTS:
            raise InputError(f"{name} has no effect here: {ARGUMENTS[name]} is an argument of its own; leave it out")
        if key and (section not in READ or (section == "model" and key in OF_TRAINING)):
            raise InputError(
                f"{name} has no effect on a model that is there and is not trained; settings of {', '.join(READ)} have: "
                "negpool settings SECTION lists them"
            )
    named = [] if data is None else [("data.path", str(data))]
    jobs = read_job(None, [*overrides, *named])
    return Reading(jobs.train.data, jobs.train.model, jobs.mine.encode)


def as_it_is(settings: ModelSettings, folder: str) -> ModelSettings:
    """Return the settings for a model that is there: what training would add to it is no concern.

    Raises InputError for a pooling whose weights it does not have.
    """
    if settings.pooling == "latent" and not any(Path(folder).rglob("*_LatentAttention")):
        raise InputError(f'model.pooling="latent" is trained, and {folder} has no weights of it; choose another pooling')
    return replace(settings, name=folder, **NEW)  # type: ignore[arg-type]


def locate_model(model: str, cache: Path) -> tuple[str, Path]:
    """Return what load_encoder takes, and the folder of encoded shards to use with it.

    A run folder stands for its best checkpoint, and a run's shards are used for its models by who may write there.
    """
    if model == BM25:
        raise InputError('"bm25" compares words and encodes nothing; negpool eval and mine take it, and this needs a model')
    folder = model_folder(model)
    path = Path(os.path.expanduser(model))
    parents = Path(os.path.realpath(folder)).parents  # unlike resolve, it follows a circle of links without an error
    run = path if (path / "checkpoints").is_dir() or len(parents) < 3 else parents[2]
    shards = run / "shards"
    is_of_run = (run / "checkpoints").is_dir() and (run == path or shards.is_dir())
    # Another person's run may be read and not written.
    if is_of_run and is_writable(shards if shards.is_dir() else run):
        return folder, shards
    return folder, cache / "shards"


def model_folder(model: str) -> str:
    """Return what load_encoder takes: of a run folder its best whole checkpoint, of a checkpoint its encoder."""
    path = Path(os.path.expanduser(model))
    if (told := unreadable(path)) is not None:
        raise InputError(told)
    if not path.is_dir():
        refuse_no_name(model)  # a name that leads nowhere is refused before it is looked at as a run or a checkpoint
    if (path / "checkpoints").is_dir():
        passed_over: list[TornVersion] = []
        checkpoint = best_checkpoint(path, passed_over.append)
        if checkpoint is None:
            raise _without_checkpoint(path, passed_over)
        return str(checkpoint.encoder_folder)
    if (path / "encoder").is_dir() and (path / "manifest.json").is_file():
        try:
            return str(open_checkpoint(path).encoder_folder)
        except NotReadable as told:
            raise InputError(str(told)) from told
        except TornVersion as torn:
            raise InputError(f"the checkpoint {path} is not whole ({torn}); name another one") from torn
    return model


def _without_checkpoint(run: Path, passed_over: list[TornVersion]) -> InputError:
    """Return why no checkpoint of a run is taken: there is none, none is whole, or none may be read."""
    if not passed_over:
        return InputError(f"{run} has no checkpoint yet; wait for one, or name a model folder")
    if isinstance(passed_over[0], NotReadable):
        return InputError(str(passed_over[0]))
    return InputError(f"{run} has no whole checkpoint ({passed_over[0]}); wait for one, or name a model folder")
