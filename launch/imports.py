"""The imports of a rank: seconds, of which a fifth would go into a search for garbage among objects that stay to the end."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Keep the garbage collector from what is made in this block, now and later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
