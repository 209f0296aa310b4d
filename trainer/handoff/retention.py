"""Which versions are deleted: old ones that nobody has pinned, each out of sight by one rename before it goes."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.handoff.manifest import DELETED, IS_THERE, disk_error, is_pinned, read_latest, staging_place, versions


def prune(parent: Path, keep: int, needed: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Delete all versions but the newest `keep`, the pinned ones and those still needed; return what was deleted."""
    old = [f for f in versions(parent)[:-keep] if not needed(f) and f.name != read_latest(parent)]
    return [folder for folder in old if delete_unpinned(folder)]


def delete_unpinned(folder: Path) -> bool:
    """Delete a folder unless it is pinned; return whether it is gone. Several may do so at once. Raises InputError."""
    # A pin may be by someone who found it just before; who finds it now sees that it is there.
    return not is_pinned(folder) and delete_version(folder, functools.partial(is_pinned, folder))


def delete_version(folder: Path, is_wanted: Callable[[], bool] = lambda: False) -> bool:
    """Delete a folder unless, once it is out of sight, it is found to be wanted; return whether it is gone. Raises InputError."""
    # One rename, as it came: from here on nobody opens it, and what a killed process leaves is cleared as staging is.
    gone = staging_place(folder).with_name(f"{staging_place(folder).name}{DELETED}")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        os.rename(folder, gone)
        if is_wanted():
            os.rename(gone, folder)
            return False
    except FileNotFoundError:  # another one has deleted it
        return False
    except OSError as error:
        if error.errno not in IS_THERE:  # else whoever pinned it has begun anew
            raise disk_error(error, folder) from error
    shutil.rmtree(gone, ignore_errors=True)
    return True
