"""Streaming DiLoCo: whole runs against the rule in torch and numpy, written anew here; and each mistake, caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregator import daemon
from aggregator.settings import CodecSettings, RoundSettings, RunSettings, StrategySettings
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.optimiser import ServerOptimiser
from aggregator.strategies.streaming import Streaming
from broker import tensors
from broker.errors import BadMessage, ConfigError, TaskError
from broker.messages import TrainRound, Where
from broker.tensors import Arrays
from broker.travelling import cut, due
from fluffle import simulate
from fluffle.shards import load_model
from workers import own, trainer
from workers.data import Dataset
from workers.own import FRAGMENT, own_of
from workers.partition import Plan, share_out
from workers.torch_task import TaskDefinition

ROUNDS, STEPS, PARTICIPANTS, SEED = 7, 3, 3, 42
LR, DECAY, OUTER_LR, MU = 0.02, 0.1, 0.7, 0.9


def load() -> Dataset:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    return Dataset(x, (np.sin(2 * x).sum(axis=1) + rng.normal(size=60)).astype(np.float32), name="waves")


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1))


TASK = TaskDefinition(
    name="waves", model=module, load=load, loss="mse", metric="rmse",
    defaults={
        "optimiser": "adamw", "lr": LR, "weight_decay": DECAY, "batch_size": 0, "local_epochs": STEPS,
    },
)  # fmt: skip
FRAGMENTS = {  # by hand: the bytes of 0.bias 32, 0.weight 128, 2.bias 12, 2.weight 96, 4.bias 4, 4.weight 12
    1: [{"0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"}],
    2: [{"0.bias", "0.weight"}, {"2.bias", "2.weight", "4.bias", "4.weight"}],
}


def by_hand(fragments: int, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Algorithm 2 without overlap: the outer gradient of a fragment is what it was when it was last synchronised,
    minus the mean of what it is now, P rounds later; SGD with Nesterov momentum; everybody takes up the result."""
    shards = share_out(load(), Plan(PARTICIPANTS, "iid", SEED, TASK.held_out, TASK.seed)).shards
    start = TASK.bind().initial()
    x = {name: nn.Parameter(torch.from_numpy(values.copy())) for name, values in start.items()}
    outer = torch.optim.SGD(x.values(), lr=OUTER_LR, momentum=MU, nesterov=True)
    nets = [module() for _ in shards]
    for net in nets:
        net.load_state_dict({name: values.detach() for name, values in x.items()})
    inner = [torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY) for net in nets]
    weights = [len(shard.train) / sum(len(s.train) for s in shards) for shard in shards]
    for number in range(rounds):
        for net, steps, shard in zip(nets, inner, shards, strict=True):
            for _ in range(STEPS):
                steps.zero_grad()
                outputs = net(torch.from_numpy(shard.train.x))[:, 0]
                nn.functional.mse_loss(outputs, torch.from_numpy(shard.train.y)).backward()
                steps.step()
        outer.zero_grad()  # SGD passes over what has no gradient, momentum and all
        for name in FRAGMENTS[fragments][number % fragments]:
            mean = sum(
                w * dict(net.named_parameters())[name].detach() for w, net in zip(weights, nets, strict=True)
            )
            x[name].grad = x[name].detach() - mean
        outer.step()
        for net in nets:
            for name in FRAGMENTS[fragments][number % fragments]:
                dict(net.named_parameters())[name].data.copy_(x[name].data)
    return {name: values.detach() for name, values in x.items()}


def run(fragments: int, directory: Path, **settings: Any) -> tuple[Arrays, dict[str, Any]]:
    told = {
        "round.participants": PARTICIPANTS, "stop.rounds": ROUNDS, "strategy.name": "diloco", "run.seed": SEED,
        "strategy.fragments": fragments, "run.dir": str(directory), **settings,
    }  # fmt: skip
    summary = simulate("test_streaming:TASK", told).summary
    return load_model(directory / "model.safetensors"), summary


def check(fragments: int, directory: Path) -> None:
    found, _ = run(fragments, directory)
    for name, wanted in by_hand(fragments).items():
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_run_does_what_the_paper_says(fragments: int, tmp_path: Path) -> None:
    assert [{n for n, f in cut(TASK.bind().initial(), fragments).items() if f == p} for p in range(fragments)] == (
        FRAGMENTS[fragments]
    )
    check(fragments, tmp_path)


def test_fragments_are_not_the_same_as_none() -> None:
    assert not torch.allclose(by_hand(1)["0.weight"], by_hand(2)["0.weight"], rtol=1e-2)


# -- mistakes -----------------------------------------------------------------------------------------------------


def other_order(model: Arrays, fragments: int, number: int) -> Arrays:
    return due(model, fragments, number + 1)


def reset(told: TrainRound, kept: Arrays, travels: Arrays, since: int) -> Arrays:
    """Everybody begins each round with the global model, as in plain DiLoCo."""
    return {name: values for name, values in kept.items() if not name.startswith(FRAGMENT)}


def one_momentum(self: Streaming, out: Arrays | None = None) -> Arrays:
    """Each step turns the momentum of all fragments down, and not only of that which is due."""
    moved = _finish(self, out)
    self._whole = {name: v if name in self._part else np.float32(MU) * v for name, v in self._whole.items()}
    return moved


def moment_forgotten(self: Streaming, model: Arrays, state: Arrays) -> None:
    _start(self, model, {})


_finish, _start = Streaming.finish, Streaming.start


@pytest.mark.parametrize(
    ("places", "broken"),
    [
        ([(daemon, "due"), (trainer, "due"), (own, "due")], other_order),
        ([(own, "_still_own")], reset),
        ([(Streaming, "finish")], one_momentum),
        ([(Streaming, "start")], moment_forgotten),
    ],
    ids=["order", "local state reset", "one momentum for all", "momentum forgotten"],
)
def test_a_mistake_is_caught(places: Any, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in places:
        monkeypatch.setattr(place, name, broken)
    if broken is other_order:
        monkeypatch.setattr("aggregator.strategies.streaming.due", broken)
    with pytest.raises(AssertionError):
        check(2, tmp_path)


def test_an_update_of_another_fragment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "due", other_order)
    with pytest.raises(TaskError, match=r"everybody failed in round 1: .*tensor"):
        run(2, tmp_path)


# -- the aggregator's half ----------------------------------------------------------------------------------------


def optimiser() -> ServerOptimiser:
    made = make_strategy(StrategySettings(name="diloco"), RoundSettings(participants=2, max_examples=100))
    assert isinstance(made, ServerOptimiser)
    return made


def model() -> Arrays:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=30).astype(np.float32) for name in "abcd"}


def streamed(fragments: int, *, in_place: bool) -> tuple[bytes, bytes]:
    """Model and state after six rounds of two participants, as bytes."""
    current, state, whole = bytearray(tensors.encode(model())), bytearray(), optimiser()
    for number in range(1, 7):
        one = Streaming(whole, fragments, number)
        arrays = tensors.decode(current, writable=in_place)
        one.start(arrays, tensors.decode(state, writable=in_place) if state else {})
        rng = np.random.default_rng(number)
        for who in ("p1", "p2"):
            change = {n: rng.normal(size=30).astype(np.float32) for n in due(arrays, fragments, number)}
            one.add(change, Contribution(10, who))
        moved = one.finish(arrays if in_place else None)
        assert (
            all(np.array_equal(moved[n], tensors.decode(current)[n]) for n in arrays if n not in change) or in_place
        )
        current, state = bytearray(tensors.encode(moved)), bytearray(tensors.encode(one.state))
        assert set(one.state) == {f"momentum/{name}" for name in arrays}
    return bytes(current), bytes(state)


def test_one_fragment_is_diloco_to_the_bit() -> None:
    current, state, plain = model(), tensors.encode({}), optimiser()
    for number in range(1, 7):
        plain.start(current, tensors.decode(state))
        rng = np.random.default_rng(number)
        for who in ("p1", "p2"):
            plain.add({n: rng.normal(size=30).astype(np.float32) for n in current}, Contribution(10, who))
        current = plain.finish()
        state = tensors.encode(plain.state)
    assert streamed(1, in_place=False) == (tensors.encode(current), state)


@pytest.mark.parametrize("fragments", [1, 2, 4])
def test_in_its_own_place_it_comes_to_the_same_bits(fragments: int) -> None:
    assert streamed(fragments, in_place=True) == streamed(fragments, in_place=False)


# -- what travels -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_every_tensor_is_in_one_fragment_and_they_are_of_about_one_size(sizes: list[int], fragments: int) -> None:
    arrays: Arrays = {f"t{i:02d}": np.zeros(size, np.float32) for i, size in enumerate(sizes)}
    try:
        parts = [due(arrays, fragments, number) for number in range(1, fragments + 1)]
    except ConfigError:
        parts = []
    if not parts:
        assert max(sizes) * fragments > sum(sizes) or fragments > len(sizes)
        return
    assert sorted(name for part in parts for name in part) == sorted(arrays)
    assert all(parts)
    largest = max(sum(values.size for values in part.values()) for part in parts)
    assert largest <= sum(sizes) / fragments + max(sizes)
    assert due(arrays, fragments, fragments + 1).keys() == parts[0].keys()


def test_bytes_up_fall_by_the_number_of_fragments(tmp_path: Path) -> None:
    whole, half = (run(fragments, tmp_path / str(fragments))[1]["bytes"]["up"] for fragments in (1, 2))
    assert half < whole - ROUNDS * PARTICIPANTS * 100


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strategy.name": "fedavg"}, "for 'diloco'"),
        ({"round.late": "fold"}, "round.late = 'discard'"),
        ({"round.policy": "buffered"}, "synchronous"),
        ({"strategy.clip_norm": 1.0}, "whole updates"),
        ({"codec.up": "topk:0.1"}, "owes to the next update"),
        ({"strategy.fragments": 7}, "is too many"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run(2, tmp_path, **changed)


def test_federated_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="travel whole in round 1"):
        simulate("heart", {"strategy.name": "diloco", "strategy.fragments": 2, "run.dir": str(tmp_path)})


def test_the_aggregators_own_settings_refuse_it_too() -> None:
    with pytest.raises(ValueError, match="owes to the next"):
        RunSettings(
            run_id="r", strategy=StrategySettings(name="diloco", fragments=2), codec=CodecSettings(up="sign")
        )


# -- a participant's half -----------------------------------------------------------------------------------------


def told(number: int, work: Any = "train") -> TrainRound:
    return TrainRound(
        run_id="r", epoch=1, seq=1, task=number, round=number, attempt=1, work=work, asked=("p",),
        version=number - 1, model=Where(size_bytes=1, sha256="0" * 64), fragments=4,
    )  # fmt: skip


def kept_after(number: int) -> Arrays:
    """What is kept after round `number` of four fragments a, b, c, d: all but that which was due."""
    gone = "abcd"[(number - 1) % 4]
    return {FRAGMENT + name: values + 1 for name, values in model().items() if name != gone}


@pytest.mark.parametrize(("number", "own_ones"), [(2, "bcd"), (3, "cd"), (4, "d"), (5, ""), (6, ""), (60, "")])
def test_who_missed_rounds_takes_up_what_was_synchronised_meanwhile(number: int, own_ones: str) -> None:
    found = own_of(told(number), kept_after(1), model(), since=1, server={}).model(model())
    assert {n for n in found if not np.array_equal(found[n], model()[n])} == set(own_ones)


def test_it_is_the_global_model_that_is_evaluated() -> None:
    judged = own_of(told(1, "evaluate"), kept_after(1), model(), since=1, server={}).judged(model())
    assert tensors.encode(judged) == tensors.encode(model())


@pytest.mark.parametrize("wrong", [{"fragment/z": np.zeros(1)}, {"fragment/b": np.zeros(31, np.float32)}])
def test_what_does_not_fit_the_model_is_refused(wrong: Arrays) -> None:
    with pytest.raises(BadMessage):
        own_of(told(2), wrong, model(), since=1, server={})
