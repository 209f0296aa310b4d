"""Services on one, two and three real MPI ranks, all in one start of mpiexec."""

import json
from pathlib import Path

import numpy as np

from tests.mining.run import make_job, publish_checkpoint, published, run_on_ranks
from tests.tiny import write_tiny_cross_encoder, write_tiny_dataset

KINDS = {
    "ivf": {
        "index": {"factory": "IVF8,Flat", "nprobe": 4},
        "filter": {"relative_margin": 0.01, "positive": "each"},
        "sample": {"num_negatives": 5, "method": "simans"},
        "audit": {"min_recall": 0.2},
        "encode": {"stored": "fp16"},
    },
    "codes": {"index": {"factory": "PCA16,IVF8,PQ4x4", "nprobe": 2}, "audit": {"min_recall": 0.5}},
    "all": {  # BM25's candidates, a cross-encoder, fallbacks and random passages, clusters
        "search": {"top_k": 30, "bm25_top_k": 10},
        "filter": {"relative_margin": 0.02},
        "sample": {"num_negatives": 5, "random_share": 0.2, "replace": "easy"},
        "rerank": {"top_k": 12, "margin": 0.0},
        "clusters": {"num": 6, "of": "passages"},
    },
    "auto": {"index": {"factory": "auto"}},
    "frozen": {"mine": {"passages": "frozen", "bm25_top_k": 0}},
    "drift": {"mine": {"passages": "drift", "max_drift": 2.0, "bm25_top_k": 0}},
}
ARRAYS = {"ivf": 7, "codes": 7, "all": 14, "auto": 7, "frozen": 8, "drift": 8}


def test_the_number_of_ranks_changes_no_byte_and_an_error_is_said_once(tmp_path):
    plans = []
    KINDS["all"]["rerank"]["model"] = str(write_tiny_cross_encoder(tmp_path / "cross-encoder"))
    for kind, sections in KINDS.items():
        for num_ranks in (1, 2, 3):
            job = make_job(tmp_path / "some", run=f"{kind}-{num_ranks}", **sections)
            for step in (10, 20) if "passages" in sections.get("mine", {}) else (10,):
                plans.append((job, num_ranks, publish_checkpoint(job, step).name))
    plans.append((few_texts(tmp_path / "few"), 3, None))
    refused = {**plans[0][0], "data": {"path": str(tmp_path / "nowhere")}}
    code, said = run_on_ranks(3, [*plans, (refused, 3, None)])
    assert code == 2 and said.count("negpool: there is no data set in") == 1 and "Traceback" not in said
    for kind, num_arrays in ARRAYS.items():
        one, two, three = (published(job_of(tmp_path, kind, num_ranks)) for num_ranks in (1, 2, 3))
        assert one == two == three and len(one) == num_arrays, kind
        assert len(one["v000001/ids.npy"]) > 1000
    made = made_by(job_of(tmp_path, "all", 3), 1)
    assert 0 < made["counts"]["queries_without"] < 225 < made["counts"]["random"] and made["clusters"]["sizes"]["empty"] < 6
    assert made["filter"]["dropped"].keys() >= {"judged", "relative_margin", "rerank_top_k", "rerank_margin"}
    # Two queries, three passages, three ranks: what is left for q1 is what q0 owns.
    few = Path(plans[-1][0]["run"]["folder"]) / "negatives" / "v000001"
    assert np.load(few / "indptr.npy").tolist() == [0, 1, 3] and np.load(few / "ids.npy").tolist()[0] == 2


def job_of(tmp_path, kind, num_ranks):
    return {"run": {"folder": str(tmp_path / "some" / f"{kind}-{num_ranks}")}}


def made_by(job, version):
    return json.loads((Path(job["run"]["folder"]) / "negatives" / f"v{version:06d}" / "manifest.json").read_text())


def few_texts(folder: Path) -> dict:
    data = write_tiny_dataset(folder / "data", num_queries=2)
    for split in ("dev", "test"):
        (data / "qrels" / f"{split}.tsv").unlink()
    job = make_job(folder)
    publish_checkpoint(job, 10)
    return job
