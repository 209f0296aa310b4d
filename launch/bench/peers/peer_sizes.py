"""How much `negpool bench peers` measures, and on which ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PeerSizes:
    """How much is measured."""

    queries: int = 128  # pairs of a step, over all ranks
    max_tokens: int = 64  # of a text
    rounds: int = 2  # turns of everybody, forth and back
    compared: int = 64  # pairs of the gradients that are compared, over all ranks
    steps: int = 20  # of the training of each; 0: none
    trained_queries: int = 32  # pairs of a step of the training, over all ranks
    test_queries: int = 200
    test_passages: int = 1000
    texts: int = 128  # that are encoded
    mined: int = 1500  # passages that are mined, about half of them positives


QUICK = PeerSizes(
    queries=32,
    max_tokens=32,
    compared=16,
    steps=3,
    trained_queries=16,
    test_queries=48,
    test_passages=120,
    texts=64,
    mined=200,
)


def peer_sizes(is_quick: bool, **given: int | None) -> PeerSizes:
    """Return the sizes, with what was given in the place of defaults; a step has the most pairs."""
    base = QUICK if is_quick else PeerSizes()
    sizes = replace(base, **{name: value for name, value in given.items() if value is not None})
    most = sizes.queries
    return replace(sizes, compared=min(sizes.compared, most), trained_queries=min(sizes.trained_queries, most))


def ranks_of(text: str) -> Sequence[int]:
    """Return `1,2,4` as numbers; raises InputError."""
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise InputError(f"--ranks {text} is no list of numbers; expected as in 1,2,4")
    return ranks
