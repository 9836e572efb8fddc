"""The space: what a user writes, what a trial is asked, what is refused."""

from __future__ import annotations

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.space import LoraSpace
from optuna_lora_rl.space_forms import Choice
from optuna_lora_rl.space_forms import Fixed
from optuna_lora_rl.space_forms import Range
from optuna_lora_rl.space_forms import Tied
from optuna_lora_rl.vocabulary import DEFAULTS
from optuna_lora_rl.vocabulary import VOCABULARY


def ask(space: LoraSpace, seed: int = 0) -> tuple[optuna.Trial, dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    return trial, space.suggest(trial)


def test_every_form_of_the_yaml_gives_a_whole_configuration() -> None:
    space = LoraSpace(
        {
            "lora_rank": {"low": 2, "high": 64, "log": True},
            "lora_alpha": {"ratio": {"low": 0.5, "high": 4, "log": True}, "of": "lora_rank"},
            "learning_rate": {"low": "1e-5", "high": "1e-3", "log": True},
            "lora_dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
            "target_modules": ["qv", "mine"],
            "layers": {"fixed": "0,2-3"},
            "batch_size": {"choices": [4, 8]},
            "weight_decay": 0.01,
        },
        target_sets={"mine": ["q_proj", "down_proj"]},
    )
    trial, configuration = ask(space)
    assert list(configuration) == list(VOCABULARY)
    assert set(trial.params) == {
        "lora_rank", "lora_alpha_ratio", "learning_rate", "lora_dropout", "target_modules",
        "batch_size",
    }  # fmt: skip
    ratio = trial.params["lora_alpha_ratio"]
    assert configuration["lora_alpha"] == pytest.approx(ratio * configuration["lora_rank"])
    assert configuration["layers"] == "0,2-3" and configuration["weight_decay"] == 0.01
    assert space.fixed()["weight_decay"] == 0.01


def test_tied_alpha_follows_rank_and_stays_whole() -> None:
    space = LoraSpace({"lora_rank": [4, 8, 16], "lora_alpha": "2 * lora_rank"})
    for seed in range(5):
        trial, configuration = ask(space, seed)
        assert configuration["lora_alpha"] == 2 * configuration["lora_rank"]
        assert isinstance(configuration["lora_alpha"], int)
        assert set(trial.params) == {"lora_rank"}
    assert space.fixed()["lora_alpha"] == "2 * lora_rank"


def test_a_space_can_be_said_in_objects_and_a_product_in_either_order() -> None:
    objects = LoraSpace(
        {
            "lora_rank": Range(2, 64, log=True),
            "lora_alpha": Tied("lora_rank", Range(0.5, 4, log=True)),
            "batch_size": Choice((4, 8)),
            "lora_dropout": Fixed(0.1),
        }
    )
    forms = LoraSpace(
        {
            "lora_rank": {"low": 2, "high": 64, "log": True},
            "lora_alpha": {"ratio": {"low": 0.5, "high": 4, "log": True}, "of": "lora_rank"},
            "batch_size": [4, 8],
            "lora_dropout": 0.1,
        }
    )
    assert objects.distributions() == forms.distributions()
    assert objects.fixed() == forms.fixed()
    assert LoraSpace({"lora_alpha": "lora_rank * 2"}).fixed()["lora_alpha"] == "2 * lora_rank"


def test_a_condition_decides_whether_a_parameter_is_asked_for() -> None:
    space = LoraSpace(
        {
            "init_lora_weights": {"choices": ["gaussian", "olora"], "when": {"use_dora": False}},
            "use_dora": [True, False],
        }
    )
    seen = set()
    for seed in range(8):
        trial, configuration = ask(space, seed)
        asked = "init_lora_weights" in trial.params
        assert asked is (configuration["use_dora"] is False)
        if not asked:
            assert configuration["init_lora_weights"] == "default"
        seen.add(asked)
    assert seen == {True, False}


@given(seed=st.integers(0, 10_000))
def test_resolve_gives_back_what_suggest_gave(seed: int) -> None:
    space = LoraSpace(
        {
            "lora_rank": {"low": 2, "high": 64, "log": True},
            "lora_alpha": {"ratio": {"low": 0.5, "high": 4}, "of": "lora_rank"},
            "use_dora": [True, False],
            "use_rslora": {"choices": [True, False], "when": {"use_dora": [False]}},
            "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        }
    )
    trial, configuration = ask(space, seed)
    assert space.resolve(trial.params) == configuration
    for name, distribution in space.distributions().items():
        if name in trial.params:
            assert distribution == trial.distributions[name]


def test_recommended_space_tunes_the_five_main_parameters() -> None:
    assert set(LoraSpace.recommended().distributions()) == {
        "lora_rank", "lora_alpha", "learning_rate", "lora_dropout", "target_modules",
    }  # fmt: skip


def test_every_default_passes_its_own_check() -> None:
    for name, term in VOCABULARY.items():
        assert term.check(name, DEFAULTS[name]) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lora_rnk": 8}, "did you mean lora_rank"),
        ({"frobnicate": 8}, "known are lora_rank"),
        ({"lora_rank": 0}, "space.lora_rank: 0 is out of range; use a whole number at least 1"),
        ({"lora_rank": 2.5}, "is not a whole number"),
        ({"lora_rank": "many"}, "'many' is not a whole number"),
        ({"lora_rank": True}, "True is not a whole number"),
        ({"lora_rank": {"low": 8, "high": 8}}, "the range is empty"),
        ({"lora_rank": {"low": 8}}, "do not fit together"),
        ({"lora_rank": {"low": 2, "high": 8, "steps": 2}}, "do not fit together"),
        ({"lora_rank": {"low": 2, "high": 8, "log": True, "step": 2}}, "do not go together"),
        ({"lora_rank": []}, "at least one value"),
        ({"lora_rank": [4, 4]}, "name a value twice"),
        ({"lora_dropout": 1.0}, "use a number from 0 to 0.9"),
        ({"lora_dropout": {"low": 0.0, "high": 0.5, "log": True}}, "needs low > 0"),
        ({"lora_dropout": {"low": 0.0, "high": 0.5, "log": "yes"}}, "use true or false"),
        ({"learning_rate": float("nan")}, "is not a number"),
        ({"bias": "some"}, "use none, all or lora_only"),
        ({"use_dora": "yes"}, "use true or false"),
        ({"layers": "top"}, "all, first-half, last-half, middle"),
        ({"target_modules": "atention"}, "use one of qv, attention, mlp, all-linear"),
        ({"target_modules": {"low": 1, "high": 2}}, "a range is for numbers"),
        ({"init_lora_weights": "xavierish"}, "use default, gaussian"),
        ({"lora_alpha": "2 * lora_rnk"}, "did you mean lora_rank"),
        ({"lora_alpha": "2 * optim"}, "only numbers can be tied"),
        ({"lora_alpha": {"ratio": -1, "of": "lora_rank"}}, "a number above 0"),
        (
            {"lora_alpha": "2 * lora_rank", "lora_rank": "0.5 * lora_alpha"},
            "depend on each other in a circle",
        ),
        ({"use_dora": {"choices": [True, False], "when": 3}}, "use a mapping"),
        ({"warmup_ratio": 0.5, "lora_dropout": "3 * warmup_ratio"}, "1.5 is out of range"),
        ({"lora_rank": Range(64, 2)}, "the range is empty"),
        ({"lora_rank": Fixed(-3)}, "-3 is out of range"),
    ],
)
def test_bad_input_gets_one_sentence(parameters: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        LoraSpace(parameters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_target_sets_may_not_take_a_presets_name() -> None:
    with pytest.raises(UserError, match="taken by a preset"):
        LoraSpace({}, target_sets={"qv": ["q_proj"]})


def test_truncate_is_short_for_its_limit() -> None:
    space = LoraSpace({"truncate": {"energy": {"low": 0.8, "high": 1.0}}})
    assert list(space.distributions()) == ["truncate_energy"]
    assert LoraSpace({"truncate": {"rank": 8}}).fixed()["truncate_rank"] == 8
    for form in (8, {"energy": 0.9, "rank": 8}, {"ranks": 8}):
        with pytest.raises(UserError, match=r"space\.truncate: .* use energy or rank"):
            LoraSpace({"truncate": form})


def test_defaults_keep_what_the_recommended_space_tunes() -> None:
    space = LoraSpace({"defaults": True, "max_steps": 24, "lora_dropout": 0.1})
    recommended = LoraSpace.recommended().distributions()
    assert space.distributions() == {
        name: range_ for name, range_ in recommended.items() if name != "lora_dropout"
    }
    assert space.fixed()["max_steps"] == 24
    with pytest.raises(UserError, match=r"space.defaults: 'yes' is not allowed"):
        LoraSpace({"defaults": "yes"})


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ({"lora_rank": 8}, 1),
        ({"lora_rank": [4, 8], "lora_dropout": {"low": 0.0, "high": 0.2, "step": 0.1}}, 6),
        ({"lora_rank": {"low": 2, "high": 5}, "lora_alpha": "2 * lora_rank"}, 4),
        ({"learning_rate": {"low": 1e-4, "high": 1e-2}}, None),
        ({"lora_rank": {"low": 2, "high": 64}, "max_steps": {"low": 1, "high": 1000}}, None),
        (
            {
                "use_dora": [True, False],
                "init_lora_weights": {
                    "choices": ["default", "olora"],
                    "when": {"use_dora": False},
                },
            },
            3,
        ),
    ],
)
def test_how_many_configurations_there_are(parameters: dict, count: int | None) -> None:
    assert LoraSpace(parameters).count() == count
