"""Recall and overlap against sets in plain Python."""

import numpy as np

from mining.settings import AuditSettings
from mining.table.audit import audit_sample, jaccard_of_each, recall_of_each, suspected_share


def test_recall_is_the_share_of_the_exact_ids_found():
    exact = np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1]])
    found = np.array([[3, 9, 1], [5, -1, -1], [7, -1, -1]])
    np.testing.assert_allclose(recall_of_each(found, exact), [2 / 3, 1 / 2, 1])


def test_jaccard_is_the_overlap_of_each_row():
    random = np.random.default_rng(0)
    tables = [[random.choice(9, random.integers(0, 5), replace=False) for _ in range(40)] for _ in range(2)]
    plain = [len(set(a) & set(b)) / len(set(a) | set(b)) if len(a) + len(b) else 1 for a, b in zip(*tables, strict=True)]
    csr = [(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(int)) for rows in tables]
    np.testing.assert_allclose(jaccard_of_each(*csr[0], *csr[1]), plain)
    assert (jaccard_of_each(*csr[0], *csr[0]) == 1).all()


def test_the_sample_is_drawn_anew_for_each_version():
    rows = np.arange(1000) * 3
    first, again, next_one = (audit_sample(AuditSettings(num_queries=50), 0, v, rows) for v in (1, 1, 2))
    assert len(set(first)) == 50 and first.tolist() == again.tolist() != next_one.tolist()
    assert len(audit_sample(AuditSettings(num_queries=50), 0, 1, rows[:3])) == 3


def test_the_suspected_share_leaves_out_what_is_known():
    assert suspected_share(100, {"judged": 10, "equal_texts": 6, "duplicates": 4, "relative_margin": 20}) == 0.25
    assert suspected_share(100, {"judged": 10}) is None
