"""stub"""

from typing import Any


def open_index(work, task, search) -> Any:
    raise NotImplementedError
