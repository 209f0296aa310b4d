"""Services on one, two and three real MPI ranks, all in one start of mpiexec."""

from pathlib import Path

import numpy as np

from tests.mining.run import make_job, publish_checkpoint, published, run_on_ranks
from tests.tiny import write_tiny_dataset

INDEXES = {"exact": {}, "ivf": {"factory": "IVF8,Flat", "nprobe": 4}}
STORED = {"exact": "float32", "ivf": "float16"}
SAMPLES = {"exact": "uniform", "ivf": "simans"}


def test_the_number_of_ranks_changes_no_byte_and_an_error_is_said_once(tmp_path):
    plans = []
    for kind, index in INDEXES.items():
        for num_ranks in (1, 2, 3):
            sample = {"num_negatives": 5, "method": SAMPLES[kind]}
            audit = {"min_recall": 0.2}
            sections = {"index": index, "sample": sample, "audit": audit, "encode": {"stored": STORED[kind]}}
            job = make_job(tmp_path / "some", run=f"{kind}-{num_ranks}", **sections)
            publish_checkpoint(job, 10)
            plans.append((job, num_ranks))
    plans.append((few_texts(tmp_path / "few"), 3))
    refused = {**plans[0][0], "data": {"path": str(tmp_path / "nowhere")}}
    code, said = run_on_ranks(3, [*plans, (refused, 3)])
    assert code == 2 and said.count("negpool: there is no data set in") == 1 and "Traceback" not in said
    for kind in INDEXES:
        one, two, three = (published(job) for job, _ in plans if f"/{kind}-" in job["run"]["folder"])
        assert one == two == three and set(one) == {f"v00000{v}/{n}.npy" for v in (0, 1) for n in ("ids", "indptr", "scores")}
        assert len(one["v000001/ids.npy"]) > 1000
    # Two queries, three passages, three ranks: what is left for q1 is what q0 owns.
    few = Path(plans[-1][0]["run"]["folder"]) / "negatives" / "v000001"
    assert np.load(few / "indptr.npy").tolist() == [0, 1, 3] and np.load(few / "ids.npy").tolist()[0] == 2


def few_texts(folder: Path) -> dict:
    data = write_tiny_dataset(folder / "data", num_queries=2)
    for split in ("dev", "test"):
        (data / "qrels" / f"{split}.tsv").unlink()
    job = make_job(folder)
    publish_checkpoint(job, 10)
    return job
