"""The service under SIGKILL: at every phase, at random moments, one rank and all ranks. What the next service publishes is
what an undisturbed one publishes, byte for byte, and a trainer that reads all the while never gets anything else."""

import contextlib
import random
import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.mining.run import make_job, publish_checkpoint, published
from tests.mining.services import die_as_it_begins, die_at_a_call, start_service
from trainer.data.datasets import open_dataset
from trainer.handoff.manifest import TornVersion, read_latest
from trainer.handoff.negatives import negatives_folder, open_negatives

PHASES = [
    "starting",
    "indexing words",
    "searching with BM25",
    "publishing",
    "loading",
    "encoding queries",
    "encoding",
    "indexing",
    "auditing",
    "searching",
    "publishing",
]
VICTIMS = {"alone": (1, {0}), "the first of two": (2, {0}), "the second of two": (2, {1}), "both of two": (2, {0, 1})}
NUM_MOMENTS = 20
SIGKILLED = 137


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def undisturbed(root):
    """The job of a service that nobody killed, the bytes it published, and the seconds it took."""
    job = job_of(root, "undisturbed")
    publish_checkpoint(job, 10)
    shutil.copytree(folder(job), root / "as it begins")
    start_service(job).wait()  # the first fork also starts the warm server
    shutil.rmtree(folder(job))
    shutil.copytree(root / "as it begins", folder(job))
    started = time.monotonic()
    service = start_service(job)
    assert service.wait() == 0, service.said
    expected = published(job)
    arrays = {f"v00000{v}/{n}.npy" for v in (0, 1) for n in ("ids", "indptr", "scores")}
    assert set(expected) == {*arrays, "v000001/positive_scores.npy"}
    assert len(expected["v000001/ids.npy"]) > 4000
    return expected, time.monotonic() - started


def job_of(root: Path, name: str) -> dict:
    """A job with every phase in it; its cache is its own, so that tokenising is disturbed, too."""
    return make_job(
        root,
        run=name,
        data={"path": str(root / "data"), "cache": str(root / name / "cache")},
        index={"factory": "IVF8,Flat", "nprobe": 4},
        audit={"min_recall": 0.2},
        sample={"num_negatives": 5, "method": "simans"},
    )


def begun(root: Path, name: str) -> dict:
    job = job_of(root, name)
    shutil.copytree(root / "as it begins", folder(job))
    return job


def folder(job: dict) -> Path:
    return Path(job["run"]["folder"])


@contextlib.contextmanager
def read_by_a_trainer(job: dict, expected: dict[str, bytes]):
    """Open LATEST over and over, as a trainer's feed does; whatever verifies must be what was expected."""
    data = open_dataset(Path(job["data"]["path"]), Path(job["data"]["cache"]))
    sizes, ended, opened, wrong = (len(data.training_queries()), len(data.corpus)), threading.Event(), Counter(), []

    def read() -> None:
        while not ended.wait(0.01):
            if (name := read_latest(negatives_folder(folder(job)))) is None:
                continue
            with contextlib.suppress(TornVersion):  # refused: as good as absent
                found = open_negatives(folder(job), name, *sizes)
                for part in ("indptr", "ids", "scores"):
                    if not expected[f"{name}/{part}.npy"].endswith(getattr(found, part).tobytes()):
                        wrong.append((name, part))
                opened[name] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
        time.sleep(0.1)  # for a last look at what is there now
    finally:
        ended.set()
        reader.join()
    assert not wrong and opened["v000001"], (wrong, opened)


@pytest.mark.parametrize("victims", VICTIMS)
def test_a_kill_at_every_phase_changes_no_byte(root, undisturbed, victims):
    expected, _ = undisturbed
    job = begun(root, victims)
    num_ranks, ranks = VICTIMS[victims]
    with read_by_a_trainer(job, expected):
        for phase in PHASES:
            service = start_service(job, num_ranks, before=partial(die_as_it_begins, phase, ranks))
            assert service.wait() == SIGKILLED, (phase, service.said)
        if 0 in ranks:
            assert "v000001/ids.npy" not in published(job), "the last one died before it published"
        service = start_service(job, num_ranks)
        assert service.wait() == 0, service.said
    assert published(job) == expected


STREAM = {
    "seen and searched, and not the last": ("mining.find.known_pairs", "KnownPairs.see"),
    "encoded, and not on disk": ("trainer.encoder.shards", "Shards.publish"),
}


@pytest.mark.parametrize("moment", STREAM)
def test_kills_within_the_stream_change_no_byte_whoever_goes_on(root, moment):
    """Exact search: what is best so far is in memory alone, and every start has another number of ranks."""
    jobs = [make_job(root, run=f"{moment}-{n}", mine={"bm25_top_k": 0}) for n in range(2)]
    for job in jobs:
        publish_checkpoint(job, 10)
    assert start_service(jobs[0]).wait() == 0
    for num_ranks, number in ((2, 1), (1, 2), (3, 1)):
        # A rank may find nothing left to encode: the first one that comes so far dies, and the others with it.
        before = partial(die_at_a_call, *STREAM[moment], number, set(range(num_ranks)))
        service = start_service(jobs[1], num_ranks, before=before)
        assert service.wait() == SIGKILLED, service.said
        assert not published(jobs[1])
    service = start_service(jobs[1], 2)
    assert service.wait() == 0, service.said
    assert published(jobs[1]) == published(jobs[0])


def test_kills_at_random_moments_change_no_byte(root, undisturbed):
    expected, seconds = undisturbed
    seed = random.randrange(10**6)
    draw, killed = random.Random(seed), 0
    print(f"seed {seed}")
    for number in range(2 * NUM_MOMENTS):
        job = begun(root, f"moment-{number}")
        num_ranks = 1 + number % 2
        victims = draw.choice([[0], [num_ranks - 1], range(num_ranks), "mpiexec"])
        moment = draw.uniform(0.1, seconds)
        with read_by_a_trainer(job, expected):
            service = start_service(job, num_ranks)
            time.sleep(moment)
            if victims == "mpiexec":
                service.kill_launcher()
            else:
                service.kill(*victims)
            killed += service.wait() == SIGKILLED
            service = start_service(job, num_ranks)
            assert service.wait() == 0, (seed, number, service.said)
        assert published(job) == expected, (seed, number, num_ranks, victims, moment)
        if killed == NUM_MOMENTS:  # the others were not there yet, or done
            break
    assert killed == NUM_MOMENTS, seed
