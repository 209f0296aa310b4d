import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from trainer.interrupt import ASKS_TO_STOP, Interrupt, handlers_kept

# Python runs handlers between two instructions, those of handlers included: here at every line that a handler runs.
SIGNALS_IN_HANDLERS = """
import signal, sys
from trainer.interrupt import Interrupt

interrupt = Interrupt()
def send_another(frame, event, argument):
    signal.raise_signal(signal.SIGUSR1)
    return send_another
sys.settrace(send_another)
signal.raise_signal(signal.SIGUSR1)
sys.settrace(None)
sys.exit(0 if interrupt.is_set() else 1)
"""


def test_a_signal_that_comes_while_another_is_taken_in_does_not_deadlock():
    assert subprocess.run([sys.executable, "-c", SIGNALS_IN_HANDLERS], timeout=60).returncode == 0


def test_a_second_ctrl_c_ends_it_at_once():
    script = "import signal; from trainer.interrupt import Interrupt; i = Interrupt(); assert not i.is_set()\n"
    script += "signal.raise_signal(signal.SIGINT); assert i.is_set(); signal.raise_signal(signal.SIGINT); print('on')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -2 and not ended.stdout, ended.stderr


def test_a_process_that_goes_on_has_its_own_handlers_again():
    before = [signal.getsignal(number) for number in ASKS_TO_STOP]
    with handlers_kept():
        interrupt = Interrupt()
        assert signal.getsignal(signal.SIGTERM) == interrupt._receive
    assert [signal.getsignal(number) for number in ASKS_TO_STOP] == before


def test_another_thread_than_the_main_one_leaves_signals_as_they_are():
    before = [signal.getsignal(number) for number in ASKS_TO_STOP]
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(lambda: Interrupt().is_set()).result()
    assert [signal.getsignal(number) for number in ASKS_TO_STOP] == before
