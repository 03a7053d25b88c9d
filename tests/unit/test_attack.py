"""What bad participants of a study send: forged from what they learned, the same for the same seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from broker.errors import ConfigError
from broker.messages import Wants
from broker.tensors import Arrays
from fluffle.config import from_values, load_config
from fluffle.learning import shares_of
from fluffle.simulation import attacks_of
from workers.attack import Attack, Attacker
from workers.task import Evaluation, TrainConfig, TrainResult
from workers.tasks import find_task

BASE: Arrays = {"w": np.array([1, 2, 3, 4], np.float32), "steps": np.array([5])}
CHANGE: Arrays = {"w": np.array([0.5, -0.5, 1, 0], np.float32), "steps": np.array([2])}


class Honest:
    """Adds CHANGE, or sends it as a gradient."""

    name, num_examples = "honest", 30

    def initial(self) -> Arrays:
        return BASE

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        trained = {name: arrays[name] + values for name, values in CHANGE.items()}
        return TrainResult(trained if config.wants != "gradient" else dict(CHANGE), 30, {"loss": 1.0})

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({"loss": 2.0}, 3)


def sent(attack: str, seed: int = 1, wants: Wants = "delta") -> Arrays:
    """The update: what the worker would make of what the task returned."""
    result = Attacker(Honest(), Attack.named(attack)).train(BASE, TrainConfig(1, seed, wants=wants))
    assert (result.num_examples, result.metrics) == (30, {"loss": 1.0})
    assert {name: values.dtype for name, values in result.arrays.items()} == {n: v.dtype for n, v in BASE.items()}
    if wants == "gradient":
        return result.arrays
    return {name: values - BASE[name] for name, values in result.arrays.items()}


@pytest.mark.parametrize("wants", ["delta", "gradient", "model"])
def test_the_sign_is_flipped_and_integers_stay(wants: Wants) -> None:
    assert sent("sign-flip:10", wants=wants)["w"] == pytest.approx(-10 * CHANGE["w"])
    assert sent("sign-flip:10", wants=wants)["steps"].tolist() == [2]


def test_a_little_is_a_shift_by_the_tensors_own_deviation() -> None:
    assert sent("little:1.5")["w"] == pytest.approx(CHANGE["w"] - 1.5 * np.std([0.5, -0.5, 1, 0]))


def test_noise_is_of_the_seed() -> None:
    assert (sent("gaussian:2", seed=1)["w"] == sent("gaussian:2", seed=1)["w"]).all()
    drawn = np.concatenate([sent("gaussian:2", seed=seed)["w"] for seed in range(500)])
    assert drawn.mean() == pytest.approx(0, abs=0.2)
    assert drawn.std() == pytest.approx(2, abs=0.2)


def test_it_is_otherwise_like_any_other() -> None:
    attacker = Attacker(Honest(), Attack.named("sign-flip:1"))
    assert (attacker.name, attacker.num_examples, attacker.initial()) == ("honest", 30, BASE)
    assert attacker.evaluate(BASE).metrics == {"loss": 2.0}


@pytest.mark.parametrize(
    "text", ["flip:10", "sign-flip", "sign-flip:x", "gaussian:-1", "little:inf", "little:nan", ":"]
)
def test_an_unknown_attack_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError, match="is unknown: write label-flip, sign-flip:SCALE"):
        Attack.named(text)
    for name in ("study.attack", "site.attack"):
        with pytest.raises(ConfigError, match="write label-flip, sign-flip:SCALE"):
            load_config(from_values({"task": "digits", name: text}))


def bad(attackers: int, seed: int = 1, attack: str = "sign-flip:10") -> set[str]:
    asked = {"task": "digits", "study.attack": attack, "study.attackers": attackers, "run.seed": seed}
    config = load_config(from_values(asked))
    found = attacks_of(config, shares_of(config, find_task("digits")))
    assert len(found) == 10
    assert set(found.values()) <= {"", attack}
    return {name for name, found_attack in found.items() if found_attack}


def test_who_attacks_is_drawn_by_the_seed_and_more_are_the_same_and_others() -> None:
    drawn = [bad(n) for n in range(1, 11)]
    assert [len(names) for names in drawn] == list(range(1, 11))
    assert all(fewer < more for fewer, more in pairwise(drawn))
    assert len({frozenset(bad(3, seed)) for seed in range(5)}) > 1
    assert bad(3, attack="") == set()
    with pytest.raises(ConfigError, match=r"study\.attackers = 11 is above the 10 participants"):
        bad(11)
