"""The one exception for input that a person can mend: a job, a file, a setting.

The command line prints its sentence and exits with 2, without a traceback. Anything else that is
raised is a bug of ours.
"""


class InputError(ValueError):
    """A sentence for the person at the terminal: what was found, what was expected, which setting changes it."""


class RunInUse(InputError):
    """Another live process holds this side of the run, and its status file."""


class NotFiniteEmbedding(InputError):
    """An encoder gave a text an embedding with NaN or infinity in it; the message names the text."""
