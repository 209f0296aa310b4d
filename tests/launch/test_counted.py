"""A number and the word for what it counts agree."""

import pytest

from launch.counted import counted


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (1, "query", "1 query"),
        (0, "training query", "0 training queries"),
        (1469, "training query", "1,469 training queries"),
        (2, "key", "2 keys"),
        (2, "match", "2 matches"),
        (1, "blemish", "1 blemish"),
        (3, "blemish", "3 blemishes"),
        (12_000, "passage", "12,000 passages"),
    ],
)
def test_one_is_singular_and_all_others_are_plural(number, what, said):
    assert counted(number, what) == said
