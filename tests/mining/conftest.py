"""What services leave behind in this process is put back."""

import signal

import pytest


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
