"""How a command ends when something is wrong: one class for each exit code that has a sentence of its own.

    InputError      2   a job or input that cannot be used; nobody starts it again
    MustNotGoOn    78   the run would only get worse; nobody starts it again
    MachineFailed   1   a disk, a network or a rank failed; supervisors start it again, within their limit

The command line prints the sentence without a traceback. Anything else that is raised is a bug of ours: a traceback, and 1.
"""

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_MUST_NOT_GO_ON = 1, 2, 75, 78


class InputError(Exception):
    """A sentence for the person at the terminal: what was found, what was expected, which setting changes it.

    No ValueError: pydantic, which checks the settings, would wrap those in an error of its own.
    """


class RunInUse(InputError):
    """Another live process holds this side of the run, and its status file."""


class NotFiniteEmbedding(InputError):
    """An encoder gave a text an embedding with NaN or infinity in it; the message names the text."""


class MustNotGoOn(Exception):
    """A run that would only get worse; the message says what was found, and names the last good checkpoint."""


class MachineFailed(Exception):
    """A disk, a network or another rank failed, and another start may well succeed; the message says which, and how."""
