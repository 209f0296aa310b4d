"""How a command ends when something is wrong: one class for each exit code that has a sentence of its own.

    InputError      2   a job or input that cannot be used; nobody starts it again
    MustNotGoOn    78   the run would only get worse; nobody starts it again
    MachineFailed   1   a disk, a network or a rank failed; supervisors start it again, within their limit

The command line prints the sentence without a traceback. Anything else that is raised is a bug of ours: a traceback, and 1.
Launchers change or hide codes, so a side of a run also leaves a phase in its status file, and supervisors read that first.
"""

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_MUST_NOT_GO_ON = 1, 2, 75, 78

FINISHED, STOPPED, REFUSED, MUST_NOT_GO_ON, FAILED = "finished", "stopped", "refused", "must not go on", "failed"
ENDED = (FINISHED, STOPPED, REFUSED, MUST_NOT_GO_ON, FAILED)  # phases after which a side says nothing more


class NegpoolError(Exception):
    """What negpool tells a person in one sentence: the one class to catch. No error of Python's own is among them."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in the place of a traceback, as IPython asks for it."""
        return [f"{type(self).__name__}: {self}"]


class InputError(NegpoolError):
    """A sentence for the person at the terminal: what was found, what was expected, which setting changes it.

    No ValueError: pydantic, which checks the settings, would wrap those in an error of its own.
    """


class RunInUse(InputError):
    """Another live process holds this side of the run, and its status file."""


class NotFiniteEmbedding(InputError):
    """An encoder gave a text an embedding with NaN or infinity in it; the message names the text."""


class MustNotGoOn(NegpoolError):
    """A run that would only get worse; the message says what was found, and names the last good checkpoint."""


class MachineFailed(NegpoolError):
    """A disk, a network or another rank failed, and another start may well succeed; the message says which, and how."""

    step: int | None = None  # which the run cannot pass, where that is not the step that it was at


TOLD = (InputError, MustNotGoOn, MachineFailed)  # in one sentence, without a traceback


def exit_code(error: BaseException) -> int:
    """Return the code with which a command ends."""
    if isinstance(error, InputError):
        return EXIT_REFUSED
    return EXIT_MUST_NOT_GO_ON if isinstance(error, MustNotGoOn) else EXIT_FAILED


def phase_of(error: BaseException) -> str:
    """Return the phase that a side leaves in its status file."""
    return {EXIT_REFUSED: REFUSED, EXIT_MUST_NOT_GO_ON: MUST_NOT_GO_ON}.get(exit_code(error), FAILED)
