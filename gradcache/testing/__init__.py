"""A ready-made proof that holds any objective, also one of your own, to the oracle: `prove(MyObjective())`."""

from gradcache.testing.prove import prove

__all__ = ["prove"]
