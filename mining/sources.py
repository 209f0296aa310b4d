"""The files behind the data of a run: whether they are still those that its negatives were mined from, and which are not.

Rows of negatives are row numbers of the corpus. Of another corpus with as many rows they would name other texts.
"""

import contextlib
import json
from pathlib import Path

from mining.job import MineJob
from trainer.data.datasets import RetrievalData, data_files
from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, read_manifest, versions, write_atomically
from trainer.handoff.negatives import negatives_folder


def claim_data(job: MineJob, data: RetrievalData) -> dict[str, str]:
    """Return the SHA-256 of the data's files by path, and keep them in the run folder.

    Raises InputError, naming the files, if the run has negatives of other data. Rank 0 only.
    """
    run, files = job.run.folder, data_files(job.data, job.sources)
    path = run / "status" / "miner.data.json"
    kept, (version, mined) = _read(path), _mined_data(run)
    if mined not in (None, data.digest):
        changed = _changed(kept["files"], files) if kept is not None and kept["digest"] == mined else []
        raise InputError(
            f"{', '.join(changed) or data.path} changed since negatives {version} of {run} were mined (data {data.digest[:12]}… "
            f"instead of {mined[:12]}…), and their rows would name other texts; give the data back what it held, or set "
            "run.folder to a new folder"
        )
    write_atomically(path, json.dumps({"digest": data.digest, "files": files}))
    return files


def changed_files(files: dict[str, str], job: MineJob) -> list[str]:
    """Return which of some files are not what they were, those that are gone included."""
    try:
        return _changed(files, data_files(job.data, job.sources))
    except InputError:  # without one of its files the data set cannot be opened; name the files that are gone
        return [path for path in files if not Path(path).exists()]


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def _mined_data(run: Path) -> tuple[str, str | None]:
    """Return the name of the last version of the negatives and the digest of the data that it was mined from."""
    for folder in reversed(versions(negatives_folder(run))):
        with contextlib.suppress(TornVersion):
            return folder.name, read_manifest(folder).get("data_digest")
    return "", None


def _read(path: Path) -> dict | None:
    try:
        kept = json.loads(path.read_text())
        return kept if isinstance(kept["digest"], str) and isinstance(kept["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
