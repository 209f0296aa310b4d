"""Lines of a bench that do nothing, fail, hang or die; in a module of its own, which a fresh process imports in no time."""

import os
import time

from launch.bench.lines import LeftOut, Row


def good(unit):
    return [Row("first", 1.5, unit, 1.0), Row("second", 2.0, unit)]


def process(unit):
    return [Row("process", float(os.getpid()), unit)]


def hangs(unit):
    time.sleep(600)


def dies(unit):
    os._exit(7)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def too_large(unit):
    raise OutOfMemoryError("tried to allocate")


def fails(unit):
    raise ValueError("what was\nfound")


def absent(unit):
    raise LeftOut("no such library")


def sized(sizes):
    return [Row("first", 1.5, "ms", 1.0), Row("second", 0.2, "ms", 0.5, less_is_better=True)]
