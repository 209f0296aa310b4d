# Type checkers read types of an installed package, never of a module by itself: these are negpool.py's.
from launch.python.public import *  # noqa: F403

def main() -> None: ...
