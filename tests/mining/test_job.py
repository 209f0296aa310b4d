"""Jobs that cannot work are refused in the first second, by the names of their settings."""

import subprocess
import sys

import pytest

from mining.job import MineJob, MineSettings
from mining.sampling import SampleSettings
from mining.search import SearchSettings
from trainer.errors import InputError
from trainer.handoff.negatives import ScheduleEntry
from trainer.handoff.settings import NegativesSettings


def test_more_negatives_than_candidates_are_refused():
    with pytest.raises(InputError, match=r"num_negatives=16 is more than search\.top_k=8"):
        MineJob(search=SearchSettings(top_k=8))
    with pytest.raises(InputError, match=r"num_negatives=60 is more than mine\.bm25_top_k=50"):
        MineJob(sample=SampleSettings(num_negatives=60))
    assert MineJob(mine=MineSettings(bm25_top_k=0)).mine.bm25_top_k == 0


def test_a_schedule_without_version_0_is_refused():
    schedule = NegativesSettings(schedule=(ScheduleEntry(20, 10),))
    with pytest.raises(InputError, match=r"mine\.bm25_top_k=0"):
        MineJob(negatives=schedule, mine=MineSettings(bm25_top_k=0))


def test_reading_a_job_does_not_start_mpi_or_load_faiss():
    code = "import sys, mining.job; sys.exit('mpi4py.MPI' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
