"""The public names of `import negpool`: functions, what they return, and the errors that they raise.

Nothing here imports torch before a function is called.
"""

from launch.local import TrainerDied as TrainerDied
from launch.python.hard_negatives import MinedNegatives as MinedNegatives
from launch.python.hard_negatives import mine_negatives as mine_negatives
from launch.python.proof import Proof as Proof
from launch.python.proof import check as check
from launch.python.reading import encode as encode
from launch.python.reading import evaluate as evaluate
from launch.python.reading import load as load
from launch.python.result import TrainResult as TrainResult
from launch.python.whole_job import Job as Job
from launch.python.whole_run import RunStopped as RunStopped
from launch.python.whole_run import train as train
from trainer.errors import InputError as InputError
from trainer.errors import MachineFailed as MachineFailed
from trainer.errors import MustNotGoOn as MustNotGoOn
from trainer.errors import NegpoolError as NegpoolError
from trainer.errors import RunInUse as RunInUse
