"""Settings that only a model can refuse."""

import pytest

from trainer.errors import InputError
from trainer.loss_settings import LossSettings


def test_widths_beyond_the_models_are_one_sentence():
    LossSettings(widths=(32, 16)).check_model(32)
    LossSettings().check_model(32)
    with pytest.raises(InputError, match=r"loss\.widths begins with 64, and the model's embeddings have 32 components"):
        LossSettings(widths=(64, 16)).check_model(32)


def test_scores_beyond_a_ranks_memory_are_one_sentence():
    LossSettings(keep_scores_gib=8).check_memory(8 * 2**30)
    LossSettings().check_memory(1)
    with pytest.raises(
        InputError, match=r"^loss\.keep_scores_gib=9 is more than the 8\.0 GiB of memory that a rank has; set it lower$"
    ):
        LossSettings(keep_scores_gib=9).check_memory(8 * 2**30)


def test_each_width_has_a_weight():
    with pytest.raises(InputError, match=r"loss\.width_weights are \[1\.0\]; expected one above 0 for each"):
        LossSettings(widths=(32, 16), width_weights=(1.0,))
