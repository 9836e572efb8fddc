from __future__ import annotations

from typing import Any

import pytest

from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.vocabulary import DEFAULTS


def test_what_is_left_out_has_its_default() -> None:
    configuration = Configuration.of({"lora_rank": 4})
    assert configuration.lora_rank == 4
    assert configuration == Configuration(**{**DEFAULTS, "lora_rank": 4})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rank": 4}, "rank"),
        ({"lora_rank": 0}, "lora_rank: 0"),
        ({"lora_rank": 2.5}, "lora_rank: 2.5"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0"),
        ({"bias": "some"}, "none, all or lora_only"),
        ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_N"),
        ({"init_lora_weights": "orthogonal", "lora_rank": 3}, "even lora_rank, not 3"),
        ({"init_lora_weights": "mica", "use_dora": True}, "mica does not go with use_dora"),
        (
            {"init_lora_weights": "mica", "loraplus_lr_ratio": 4.0},
            "mica does not go with loraplus_lr_ratio",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "no fixed course"),
    ],
)
def test_what_cannot_be_trained_is_a_configuration_error(
    parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(FineTuningError) as refused:
        Configuration.of(parameters)
    assert refused.value.reason == "configuration"
    assert words in refused.value.message
