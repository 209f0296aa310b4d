"""The allocator's setting: ours unless the user has one, and in time for PyTorch."""

import subprocess
import sys

import pytest

from launch.allocator import GROWING, NAMES, allocator_setting


def test_segments_grow_where_there_is_a_gpu_and_the_user_says_nothing():
    assert allocator_setting({"PATH": "/bin"}, has_gpu=True) == GROWING == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_setting({"PATH": "/bin"}, has_gpu=False) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["max_split_size_mb:64", "expandable_segments:False", ""])
def test_what_the_user_says_of_the_allocator_stays(name, value):
    assert allocator_setting({name: value}, has_gpu=True) == {}


def test_the_command_sets_it_before_pytorch_is_there():
    code = (
        "import os, sys, launch.__main__ as command, launch.commands as commands\n"
        "command.NVIDIA_DRIVER = type('There', (), {'exists': lambda self: True})()\n"
        "commands.app = lambda **_: print(os.environ['PYTORCH_CUDA_ALLOC_CONF'], 'torch' in sys.modules)\n"
        "command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["expandable_segments:True", "False"]
