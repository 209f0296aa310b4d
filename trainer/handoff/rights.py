"""Who may read what is published, and what is said of that which this process may not read.

Libraries make files that their owner alone may read (safetensors does), and a colleague would then find a run without a
checkpoint. What may not be read is there: it is never said to be absent.
"""

import contextlib
import os
import stat
from pathlib import Path


def give_rights(folder: Path) -> None:
    """Give all that is below a new folder the rights that files and folders get where nobody says otherwise.

    They are read off the folder itself, which `mkdir` has just made: asking for the umask means to change it for a moment,
    for all threads.
    """
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = mode & 0o7000 | (allowed if path.is_dir() else allowed & 0o666)
        if mode != wanted:
            with contextlib.suppress(OSError):  # a disk without rights has nothing to give
                path.chmod(wanted)


def unreadable(path: Path | str) -> str | None:
    """Return the sentence for a file or folder that this process may not read, or may not even look for; None: it may."""
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError:
        # The outermost folder that may not be entered: what lies in it is not known.
        return _sentence(next((folder for folder in reversed(path.absolute().parents) if not _may(folder, os.X_OK)), path))
    except (OSError, ValueError):  # it is not there, or no path
        return None
    return None if _may(path, os.R_OK | os.X_OK if is_folder else os.R_OK) else _sentence(path)


def is_writable(folder: Path) -> bool:
    """Tell whether this process may make files in a folder that is there."""
    return _may(folder, os.W_OK | os.X_OK)


def _may(path: Path, rights: int) -> bool:
    # As the one that opens files: a process may act for another user.
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)


def _sentence(path: Path) -> str:
    try:
        owner = f", {path.owner()},"
    except (OSError, KeyError):  # a number without a name
        owner = ""
    return f"{path} cannot be read: permission denied; ask its owner{owner} for the right to read it (chmod -R a+rX {path})"
