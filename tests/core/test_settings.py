"""Settings: recipes, overrides, learning rates, and every number out of range."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from autoround_core.errors import UnknownNameError, UsageError
from autoround_core.settings import RECIPES, TuningSettings, tuning_settings


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # what users of AutoRound know these names to mean
        ("best", {"algorithm": "signround", "iters": 1000, "nsamples": 512}),
        ("base", {"algorithm": "signround", "iters": 200, "nsamples": 128, "lr": None}),
        ("light", {"algorithm": "signround", "iters": 50, "nsamples": 128, "lr": 5e-3}),
        ("opt_rtn", {"algorithm": "opt_rtn", "iters": 0}),
        ("rtn", {"algorithm": "rtn", "iters": 0}),
    ],
)
def test_recipes(recipe, expected):
    settings = tuning_settings(recipe).asdict()
    assert settings == settings | expected
    assert (settings["batch_size"], settings["seqlen"], settings["seed"]) == (8, 2048, 42)
    assert recipe in RECIPES


def test_the_default_recipe_is_base():
    assert tuning_settings() == tuning_settings(None) == tuning_settings("base") == TuningSettings()


def test_overrides_change_what_they_name_and_none_changes_nothing():
    settings = tuning_settings("light", nsamples=4, lr=None, seed=0)
    assert settings == dataclasses.replace(RECIPES["light"], nsamples=4, seed=0)
    assert RECIPES["light"].nsamples == 128


def test_settings_can_be_written_down():
    assert TuningSettings(**json.loads(json.dumps(tuning_settings("best").asdict()))) == RECIPES["best"]


@pytest.mark.parametrize(("recipe", "hint"), [("bset", "best"), ("Light", "light"), ("optrtn", "opt_rtn")])
def test_an_unknown_recipe_is_refused(recipe, hint):
    with pytest.raises(UnknownNameError, match=f"unknown recipe `{recipe}`; did you mean `{hint}`"):
        tuning_settings(recipe)


@pytest.mark.parametrize(
    ("option", "hint"), [("iter", "iters"), ("n_samples", "nsamples"), ("batchsize", "batch_size")]
)
def test_an_unknown_option_is_refused_even_without_a_value(option, hint):
    with pytest.raises(UnknownNameError, match=f"did you mean `{hint}`"):
        tuning_settings(**{option: None})


@pytest.mark.parametrize(
    "option,least",
    [
        ("iters", 0),
        ("nsamples", 1),
        ("seqlen", 2),
        ("batch_size", 1),
        ("gradient_accumulate_steps", 1),
        ("seed", 0),
    ],
)
def test_whole_numbers_have_a_least_value(option, least):
    assert getattr(TuningSettings(**{option: least}), option) == least
    for value in (least - 1, -10, 1.5, float(least + 1), True, "8", math.nan):
        with pytest.raises(
            UsageError, match=f"{option} must be a whole number of at least {least}, got {value}"
        ):
            TuningSettings(**{option: value})


@pytest.mark.parametrize("option", ["lr", "minmax_lr"])
def test_learning_rates_lie_above_zero_and_up_to_one(option):
    for value in (1, 1.0, 1e-6):
        assert getattr(TuningSettings(**{option: value}), option) == value
    for value in (0, 0.0, -0.1, 1.01, math.nan, math.inf, "0.1", True, [0.1]):
        with pytest.raises(UsageError, match=f"{option} must be above 0 and at most 1"):
            TuningSettings(**{option: value})


@pytest.mark.parametrize(
    ("settings", "bits", "expected"),
    [
        ({}, 4, (1 / 200, 1 / 200)),
        ({}, 2, (1 / 200, 1 / 200)),
        ({"iters": 1000}, 4, (1 / 1000, 1 / 1000)),
        ({"iters": 1000}, 3, (2 / 1000, 2 / 1000)),  # few bits and many steps: further
        ({"iters": 1000}, 2, (2 / 1000, 2 / 1000)),
        ({"iters": 999}, 2, (1 / 999, 1 / 999)),
        ({"iters": 1000, "lr": 0.5}, 2, (0.5, 0.5)),
        ({"minmax_lr": 2e-3}, 4, (1 / 200, 2e-3)),
        ({"lr": 0.25, "minmax_lr": 0.125}, 8, (0.25, 0.125)),
        ({"iters": 0}, 4, (1.0, 1.0)),
    ],
)
def test_learning_rates(settings, bits, expected):
    assert TuningSettings(**settings).rates(bits) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("recipe", [None, "base", "best", "light"])
def test_no_steps_means_searched_scales(recipe):
    assert tuning_settings(recipe, iters=0).algorithm == "opt_rtn"


def test_no_steps_and_an_algorithm_of_ones_own():
    assert tuning_settings(iters=0, algorithm="rtn").algorithm == "rtn"
    with pytest.raises(UsageError, match="opt_rtn or rtn"):
        tuning_settings(iters=0, algorithm="signround")
    with pytest.raises(UsageError, match="opt_rtn or rtn"):
        tuning_settings("rtn", algorithm="signround")
    assert tuning_settings("rtn", algorithm="signround", iters=5).iters == 5
