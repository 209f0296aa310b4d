"""Whether a run has collapsed: all texts have nearly one embedding, and there is nothing left to learn from.

Contrastive training spreads embeddings out. A learning rate that is too high drives them into one point within a few steps,
where gradients are nearly zero: the loss stays at the logarithm of the number of passages, and no later step leads out.
"""

LEAST_SPREAD = 1e-3  # of evaluated embeddings, which have no dropout; a model's that was never trained is .05 and more
SHARE = 1 / 20  # of the widest spread that a run had: what dropout alone makes of one point is a fiftieth and less
STEPS = 5  # in a row


def in_words(step: int, found: str, good: str, lr: float) -> str:
    """Return the sentence that ends a run. found: what the embeddings are like; good: which checkpoint to go on from."""
    return (
        f"step {step}: the model has collapsed: {found}; {good}; set a lower optim.lr, now {lr:g}, or a longer "
        "optim.warmup_share, and go on from there in a new run.folder"
    )


class Collapse:
    """Follows the spread of the embeddings of each step. The same on all ranks."""

    def __init__(self) -> None:
        self.widest = 0.0
        self.num_steps = 0  # in a row, as narrow as that

    def observe(self, spread: float | None) -> bool:
        """Take in a step's spread, 1 - the mean cosine of its embeddings, None: unknown; return whether the run has collapsed."""
        if spread is not None:
            self.widest = max(self.widest, spread)
            self.num_steps = self.num_steps + 1 if spread < SHARE * self.widest else 0
        return self.num_steps >= STEPS
