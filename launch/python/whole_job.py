"""`negpool.Job`: a whole job, read and checked, from a TOML file, from keywords, or from both."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w

from launch.jobfile import Jobs, read_job
from launch.python.in_memory import Data, Model, PathLike, data_path, model_folder
from launch.python.keywords import overrides_of
from trainer.errors import InputError

JobLike: TypeAlias = "PathLike | Job"


class Job(Jobs):
    """A job with all its settings: `train`, `mine` and `launch` have its sections, as in `job.train.optim.lr`."""

    def __init__(
        self,
        model: "Model | Mapping[str, Any] | None" = None,
        data: "Data | Mapping[str, Any] | None" = None,
        *,
        job: "JobLike | None" = None,
        **settings: object,
    ) -> None:
        """Read and check a job; raises InputError.

        model: a name, a folder or a SentenceTransformer, or the section as a dictionary. data: as `negpool.train` takes it.
        job: a job file, or another job, whose settings hold where no argument sets them.
        settings: sections as dictionaries, `optim={"lr": 2e-5}`, or single keys, `**{"optim.lr": 2e-5}`.
        """
        path, own = (None, job.overrides()) if isinstance(job, Job) else (_file(job), [])
        given = overrides_of(settings, model=_as_model(model, settings), data=_as_data(data, settings))
        jobs = read_job(path, [*own, *given])
        super().__init__(jobs.train, jobs.mine, jobs.launch)

    @classmethod
    def read(cls, path: PathLike, **settings: object) -> "Job":
        """Return the job of a TOML file, with some settings in the place of the file's."""
        return cls(job=path, **settings)  # type: ignore[arg-type] # model and data may be among them

    def to_toml(self) -> str:
        """Return the job as a job file with every setting, defaults included."""
        return tomli_w.dumps(self.resolved())

    def overrides(self) -> list[tuple[str, Any]]:
        """Return every setting by its name, as they make this job again."""
        sections = self.resolved()
        if self.train.sources:
            del sections["data"]["path"]  # which has no effect beside them
        return overrides_of(sections)

    def __repr__(self) -> str:
        """Name what tells one job from another."""
        paths = [str(source.path) for source in self.train.sources.values()] or [str(self.train.data.path)]
        return f"Job(model={self.train.model.name!r}, data={' + '.join(paths)!r}, run={str(self.train.run.folder)!r})"


def _file(job: "PathLike | None") -> Path | None:
    if job is not None and not isinstance(job, str | os.PathLike):
        raise InputError(f"job is a {type(job).__name__}; expected a job file or a negpool.Job")
    return None if job is None else Path(job)


def cache_of(settings: Mapping[str, Any]) -> Path:
    """Return where objects become files: in the job's cache, where the keywords name one, else in the user's."""
    from trainer.data.cache import cache_folder

    section = settings.get("data")
    named = settings.get("data.cache", section.get("cache") if isinstance(section, Mapping) else None)
    return cache_folder(None if named is None else Path(named))


def _as_model(model: "Model | Mapping[str, Any] | None", settings: Mapping[str, Any]) -> str | Mapping[str, Any] | None:
    return model if model is None or isinstance(model, Mapping) else model_folder(model, cache_of(settings))


def _as_data(data: "Data | Mapping[str, Any] | None", settings: Mapping[str, Any]) -> str | Mapping[str, Any] | None:
    """Return the name of a data set, or the section as it is given."""
    from dataclasses import fields

    from trainer.handoff.settings import DataSettings

    if data is None or (isinstance(data, Mapping) and data.keys() <= {field.name for field in fields(DataSettings)}):
        return data
    return data_path(data, str(settings.get("data.train_split", "train")), cache_of(settings))
