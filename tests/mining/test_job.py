"""Jobs that cannot work are refused in the first second, by the names of their settings."""

import multiprocessing
import sys

import pytest

from mining.job import MineJob
from mining.settings import MineSettings, SampleSettings, SearchSettings
from tests.ranks import PRELOAD
from trainer.errors import InputError
from trainer.handoff.settings import NegativesSettings, ScheduleEntry


def test_more_negatives_than_candidates_are_refused():
    with pytest.raises(InputError, match=r"num_negatives=16 is more than search\.top_k=8"):
        MineJob(search=SearchSettings(top_k=8))
    with pytest.raises(InputError, match=r"num_negatives=60 is more than mine\.bm25_top_k=50"):
        MineJob(sample=SampleSettings(num_negatives=60))
    assert MineJob(mine=MineSettings(bm25_top_k=0)).mine.bm25_top_k == 0


def test_a_schedule_without_version_0_is_refused():
    schedule = NegativesSettings(schedule=(ScheduleEntry(checkpoint=10, step=20),))
    with pytest.raises(InputError, match=r"mine\.bm25_top_k=0"):
        MineJob(negatives=schedule, mine=MineSettings(bm25_top_k=0))


def exit_with_what_was_loaded():
    sys.exit(any(name in sys.modules for name in ("mpi4py.MPI", "faiss")))


def test_reading_a_job_does_not_start_mpi_or_load_faiss():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "mining.service"])
    process = context.Process(target=exit_with_what_was_loaded)
    process.start()
    process.join()
    assert process.exitcode == 0 and "mining.job" in sys.modules
