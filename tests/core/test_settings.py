from __future__ import annotations

from typing import Any

import pytest

from lustral.catalog import ATTACKS, DETECTORS, INVERTERS, PURIFIERS
from lustral.core.settings import SettingsError, build, describe
from lustral.training import Trainer

KINDS: dict[str, Any] = {**ATTACKS, **DETECTORS, **INVERTERS, **PURIFIERS, "trainer": Trainer}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_settings_survive_plain_data(name: str) -> None:
    kind = KINDS[name]
    assert build(kind, describe(kind())) == kind()
    assert build(kind, {}) == kind()


def test_a_nested_change_keeps_the_methods_own_defaults() -> None:
    given = PURIFIERS["fine_tuning"]()
    changed: Any = build(PURIFIERS["fine_tuning"], {"trainer": {"epochs": 3}})
    assert changed.trainer.epochs == 3
    assert changed.trainer.learning_rate == given.trainer.learning_rate != Trainer().learning_rate  # type: ignore[attr-defined]


def test_a_base_is_kept_where_nothing_is_said() -> None:
    base = Trainer(epochs=3, augment=None, momentum=0.5)
    assert build(Trainer, {"epochs": 4}, base=base) == Trainer(epochs=4, augment=None, momentum=0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"triner": {}}, "unknown setting 'triner'; did you mean 'trainer'?"),
        ({"trainer": {"epoch": 3}}, "unknown setting 'trainer.epoch'; did you mean 'epochs'?"),
        ({"trainer": {"epochs": "many"}}, "trainer.epochs: input should be a valid integer"),
        ({"trainer": {"optimizer": "sdg"}}, "trainer.optimizer: input should be 'sgd'"),
        ({"trainer": {"epochs": -1}}, "trainer: expected epochs >= 0"),
        ({"holdout": 3.0}, "expected a held-out share in (0, 1); got 3.0"),
        (None, "expected settings by name; got None"),
    ],
)
def test_bad_settings_are_refused_with_the_place(values: Any, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build(PURIFIERS["mesa"], values)
    assert words in str(caught.value)


def test_all_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        build(PURIFIERS["mesa"], {"triner": {}, "trainer": {"epoch": 3}})
    assert len(str(caught.value).splitlines()) == 2
