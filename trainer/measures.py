"""The measures of an evaluation, as people read them; trainer/evaluate.py computes them."""

MEASURE_TITLES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@10": "Recall@10", "recall@100": "Recall@100"}
