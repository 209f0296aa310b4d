"""Makes a trainer sleep after each step for the seconds in the file `slow` beside its job, while there is one.

Python imports this by itself where the folder is on PYTHONPATH: steps of the tiny encoder are too quick to be disturbed.
"""

import functools
import sys
import threading
import time
from pathlib import Path


def slow_down() -> None:
    while not hasattr(sys.modules.get("trainer.train"), "update"):
        time.sleep(0.05)
    train = sys.modules["trainer.train"]
    update, file = train.update, Path(sys.argv[-1]).parent / "slow"

    @functools.wraps(update)
    def slow_update(run):
        if file.exists():
            time.sleep(float(file.read_text()))
        return update(run)

    train.update = slow_update


if "train" in getattr(sys, "orig_argv", []):
    threading.Thread(target=slow_down, daemon=True).start()
