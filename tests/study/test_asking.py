"""Ask and tell through JSON."""

from __future__ import annotations

import json

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import asking
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


@pytest.mark.parametrize("sampler", ["rl", "bandit", "tpe", "qmc"])
def test_what_is_told_decides_what_is_asked_next(make_spec: MakeSpec, sampler: str) -> None:
    spec = make_spec({"sampler": sampler})
    first, second = (json.loads(line) for line in asking.ask(spec, 2))
    assert first["params"] != second["params"]
    assert first["configuration"]["lora_rank"] == first["params"]["lora_rank"]
    assert first["configuration"]["max_steps"] == 4
    told = json.loads(asking.tell(spec, json.dumps({"trial": 0, "value": 0.42})))
    assert told == {"trial": 0, "state": "COMPLETE", "values": [0.42]}
    asking.tell(spec, '{"trial": 1, "state": "fail", "reason": "the node went away"}')
    study = opening.load_study(spec)
    assert study.best_value == 0.42
    assert study.trials[1].user_attrs["failure_message"] == "the node went away"
    assert json.loads(next(asking.ask(spec, 1)))["trial"] == 2


def test_nothing_but_json_is_printed(
    make_spec: MakeSpec, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec()
    next(asking.ask(spec, 1))
    asking.tell(spec, '{"trial": 0, "value": 0.5}')
    assert capfd.readouterr() == ("", "")


def test_several_objectives_are_told_as_a_list(make_spec: MakeSpec) -> None:
    spec = make_spec({"objective.objectives": ["quality", "cost"]})
    next(asking.ask(spec, 1))
    with pytest.raises(UserError, match="values must be a list of 2 numbers"):
        asking.tell(spec, '{"trial": 0, "value": 1}')
    asking.tell(spec, '{"trial": 0, "values": [0.5, 1]}')
    assert opening.load_study(spec).best_trials[0].values == [0.5, 1.0]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ('{"trial": 5, "value": 1}', "trial 5 does not exist; the study has 1 trials"),
        ('{"trial": 0, "value": "much"}', "value must be a number, not 'much'"),
        ('{"trial": 0}', "value must be a number, not None"),
        ('{"trial": 0, "value": NaN}', "value must be a number, not nan"),
        ('{"trial": 0, "state": "done"}', "state is 'done'; the only state to tell is fail"),
    ],
)
def test_a_result_that_makes_no_sense_is_refused(
    make_spec: MakeSpec, said: str, sentence: str
) -> None:
    spec = make_spec()
    next(asking.ask(spec, 1))
    with pytest.raises(UserError, match=sentence):
        asking.tell(spec, said)


def test_a_trial_is_told_once_and_asked_ones_do_not_disturb_a_run(
    make_spec: MakeSpec, paper: type[PaperTuner]
) -> None:
    spec = make_spec()
    next(asking.ask(spec, 1))
    assert len(runner.run(spec).study.trials) == 4
    asking.tell(spec, '{"trial": 0, "value": 1}')
    with pytest.raises(UserError, match="trial 0 is already complete"):
        asking.tell(spec, '{"trial": 0, "value": 1}')
