"""The helper that makes a learning task out of a module, a loss, data and preprocessing."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from broker.errors import ConfigError, DataError, TaskError
from workers import torch_task
from workers.data import Dataset
from workers.preprocess import Preprocess, Reference
from workers.recipe import Recipe, recipe
from workers.scaler import FederatedScaler, local_moments
from workers.task import Arrays, LearningTask, Scalar, TrainConfig, TrainResult, WorkAbandoned
from workers.torch_task import TaskDefinition, TorchTask

torch.set_num_threads(1)


def points(n: int = 60, seed: int = 0) -> Dataset:
    """Two classes in four dimensions, told apart by the first coordinate."""
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return Dataset(x, (x[:, 0] > 0).astype(np.int64), name="points")


def linear() -> nn.Module:
    return nn.Linear(4, 2)


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


TOY = TaskDefinition(name="toy", model=linear, load=points, defaults={"lr": 0.5, "batch_size": 8})


def config(number: int = 2, seed: int = 7, **train: Scalar) -> TrainConfig:
    return TrainConfig(number, seed, train)


def gradient_of(task: TorchTask, arrays: Arrays, **train: Scalar) -> TrainResult:
    return task.train(arrays, TrainConfig(1, 7, train, wants="gradient"))


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def frozen(arrays: Arrays) -> Arrays:
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def test_it_is_a_learning_task() -> None:
    task: LearningTask = TOY.bind(points(), points(seed=1))
    assert isinstance(task, LearningTask)
    assert (task.name, task.num_examples) == ("toy", 60)


def test_the_initial_model_is_the_same_everywhere_and_leaves_torch_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = TOY.bind().initial()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(one, TOY.bind(points()).initial())
    assert not same(one, replace(TOY, seed=43).bind().initial())


def test_buffers_travel_with_their_names_and_dtypes() -> None:
    definition = replace(TOY, model=with_norm)
    task = definition.bind(points(), points())
    before = task.initial()
    after = task.train(before, config()).arrays
    assert before["1.num_batches_tracked"].dtype == np.int64
    assert {name: (a.shape, a.dtype) for name, a in before.items()} == {
        name: (a.shape, a.dtype) for name, a in after.items()
    }
    assert after["1.num_batches_tracked"] == 8
    assert not np.array_equal(before["1.running_mean"], after["1.running_mean"])


@pytest.mark.parametrize("model", [linear, with_norm])
def test_training_depends_on_the_seed_alone(model: type[nn.Module]) -> None:
    definition = replace(TOY, model=model)
    task, other = definition.bind(points()), definition.bind(points())
    start = frozen(task.initial())
    first = task.train(start, config(local_epochs=2)).arrays
    torch.manual_seed(99)
    before = torch.get_rng_state()
    other.train(start, config(seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, other.train(start, config(local_epochs=2)).arrays)
    assert same(first, task.train(start, config(local_epochs=2)).arrays)
    assert not same(first, task.train(start, config(seed=8, local_epochs=2)).arrays)


def test_results_are_the_callers_own() -> None:
    task = TOY.bind(points())
    first = task.train(task.initial(), config()).arrays
    kept = {name: array.copy() for name, array in first.items()}
    task.train(first, config(3))
    assert same(first, kept)


def test_one_step_is_gradient_descent_by_hand() -> None:
    data = points()
    task = TOY.bind(data)
    start = task.initial()
    end = task.train(start, config(lr=0.1, batch_size=0, l2=0.5)).arrays
    logits = data.x @ start["weight"].T + start["bias"]
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (chance - np.eye(2)[data.y]) / len(data)
    gradient = error.T @ data.x + 0.5 * start["weight"]  # alpha/2 ||w||^2 has gradient alpha w
    np.testing.assert_allclose(end["weight"], start["weight"] - 0.1 * gradient, atol=1e-6)
    np.testing.assert_allclose(end["bias"], start["bias"] - 0.1 * error.sum(axis=0), atol=1e-6)


def test_momentum_is_that_of_torch() -> None:
    data, task = points(), TOY.bind(points())
    start = task.initial()
    end = task.train(start, config(lr=0.1, batch_size=0, momentum=0.9, local_epochs=4)).arrays
    module = linear()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    velocity = [torch.zeros_like(p) for p in module.parameters()]
    for _ in range(4):
        module.zero_grad()
        nn.functional.cross_entropy(module(torch.from_numpy(data.x)), torch.from_numpy(data.y)).backward()
        with torch.no_grad():
            for v, p in zip(velocity, module.parameters(), strict=True):
                assert p.grad is not None
                v.mul_(0.9).add_(p.grad)
                p.sub_(v, alpha=0.1)
    np.testing.assert_allclose(end["weight"], module.weight.detach().numpy(), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), batch=st.integers(0, 80), epochs=st.integers(1, 3), most=st.integers(0, 9))
def test_the_number_of_steps_is_as_set(n: int, batch: int, epochs: int, most: int) -> None:
    task = TOY.bind(points(n))
    polls: list[None] = []  # one before each step
    told = replace(
        config(batch_size=batch, local_epochs=epochs, max_steps=most), should_stop=lambda: bool(polls.append(None))
    )
    result = task.train(task.initial(), told)
    whole = epochs * (-(-n // batch) if batch else 1)
    assert len(polls) == (min(most, whole) if most else whole)
    assert result.num_examples == n


def test_a_full_batch_may_be_larger_than_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TOY.bind(points(), points(seed=1))
    start = task.initial()
    whole, measured = gradient_of(task, start, l2=0.1), task.evaluate(start)
    monkeypatch.setattr(torch_task, "CHUNK_ROWS", 7)
    parts = gradient_of(task, start, l2=0.1)
    np.testing.assert_allclose(whole.arrays["weight"], parts.arrays["weight"], atol=1e-6)
    assert whole.metrics["loss"] == pytest.approx(parts.metrics["loss"])
    assert measured.metrics == pytest.approx(task.evaluate(start).metrics)


def test_a_gradient_is_that_of_a_full_batch_step() -> None:
    task = TOY.bind(points())
    start = task.initial()
    gradient = gradient_of(task, start, l2=0.1, batch_size=3)
    stepped = task.train(start, config(lr=1.0, batch_size=0, l2=0.1)).arrays
    for name, array in gradient.arrays.items():
        np.testing.assert_allclose(start[name] - stepped[name], array, atol=1e-6)


def test_a_gradient_has_zeros_for_buffers() -> None:
    task = replace(TOY, model=with_norm).bind(points())
    gradient = gradient_of(task, task.initial()).arrays
    assert not gradient["1.running_mean"].any()
    assert gradient["1.num_batches_tracked"].dtype == np.int64
    assert gradient["0.weight"].any()


def test_evaluation_gives_means_over_held_out_examples() -> None:
    task = TOY.bind(points(), points(30, seed=1))
    start = task.initial()
    trained = task.train(start, config(local_epochs=10)).arrays
    measured = task.evaluate(frozen(trained))
    assert measured.num_examples == 30
    assert measured.metrics["accuracy"] > 0.9
    assert measured.metrics["loss"] < task.evaluate(start).metrics["loss"]


def test_regression_reports_rmse_and_mae() -> None:
    data = Dataset(np.zeros((2, 1)), np.array([3.0, 4.0]))
    task = TaskDefinition(
        name="zero", model=lambda: nn.Linear(1, 1, bias=False), load=lambda: data, loss="mse", metric="rmse"
    ).bind(data, data)
    assert task.evaluate(task.initial()).metrics == pytest.approx({"loss": 12.5, "rmse": 12.5**0.5, "mae": 3.5})


def test_a_loss_can_be_any_function() -> None:
    def twice(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(outputs, targets)

    task, doubled = TOY.bind(points(), points()), replace(TOY, loss=twice).bind(points(), points())
    start = task.initial()
    assert doubled.evaluate(start).metrics["loss"] == pytest.approx(2 * task.evaluate(start).metrics["loss"])


def test_training_stops_when_told() -> None:
    task, calls = TOY.bind(points()), iter([False, False, True])
    stop = replace(config(), should_stop=lambda: next(calls))
    with pytest.raises(WorkAbandoned, match="after 2 steps"):
        task.train(task.initial(), stop)


def test_a_diverging_loss_names_the_learning_rate() -> None:
    regression = replace(TOY, model=lambda: nn.Linear(4, 1), loss="mse", metric="rmse")
    task = regression.bind(replace(points(), y=points().x[:, 1]))
    with pytest.raises(TaskError, match=r"train\.lr = 100: lower train\.lr \(try 10\)"):
        task.train(task.initial(), config(lr=100.0, local_epochs=100))
    large = replace(TOY, loss=lambda outputs, _: outputs.mean()).bind(replace(points(), x=np.full((60, 4), 1e36)))
    with pytest.raises(TaskError, match=r"weight is not finite with train\.lr = 1000"):  # after the last step
        large.train(large.initial(), config(lr=1e3, max_steps=1))
    broken = {name: np.full_like(array, np.nan) for name, array in TOY.bind().initial().items()}
    with pytest.raises(TaskError, match="loss not finite"):
        TOY.bind(held_out=points()).evaluate(broken)


def test_an_empty_shard_names_the_participant() -> None:
    empty = points().take(np.arange(0))
    with pytest.raises(DataError, match=r"p07 has no example to train on for task 'toy' \(0 rows came in"):
        TOY.bind(empty, points(), "p07")
    nothing = replace(points(3), x=np.full((3, 4), np.nan))
    with pytest.raises(DataError, match=r"3 rows came in, 3 were dropped.*preprocess\.missing"):
        TOY.bind(nothing)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(TaskError, match="without training data"):
        TOY.bind(held_out=points()).train(TOY.bind().initial(), config())
    with pytest.raises(TaskError, match=r"no held-out examples.*evaluation\.mode = central"):
        TOY.bind(points(), points().take(np.arange(0))).evaluate(TOY.bind().initial())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"weight": a["weight"]}, r"missing \['bias'\]"),
        (lambda a: {**a, "more": a["bias"]}, r"unknown \['more'\]"),
        (
            lambda a: {**a, "weight": a["weight"].T},
            r"'weight' is float32 \(4, 2\), this model's is float32 \(2, 4\)",
        ),
        (lambda a: {**a, "bias": a["bias"].astype(np.float64)}, "'bias' is float64"),
    ],
)
def test_foreign_arrays_are_refused(change: type, message: str) -> None:
    task = TOY.bind(points(), points())
    for use in (lambda arrays: task.train(arrays, config()), task.evaluate):
        with pytest.raises(TaskError, match=message):
            use(change(task.initial()))


def test_a_model_that_does_not_fit_the_data_is_named() -> None:
    task = replace(TOY, model=lambda: nn.Linear(5, 2)).bind(points())
    with pytest.raises(TaskError, match=r"task 'toy': model, loss or metric failed on inputs \(8, 4\)"):
        task.train(task.initial(), config())
    wrong = replace(TOY, metric="rmse").bind(points(), points())
    with pytest.raises(TaskError, match=r"metric failed on inputs \(60, 4\).*shape"):
        wrong.evaluate(wrong.initial())
    vector = replace(TOY, loss=lambda outputs, _: outputs[:, 0]).bind(points())
    with pytest.raises(TaskError, match=r"must be a scalar: return its mean"):
        vector.train(vector.initial(), config())


def test_tensors_without_a_numpy_type_are_refused() -> None:
    with pytest.raises(TaskError, match="cannot travel"):
        replace(TOY, model=lambda: nn.Linear(4, 2).bfloat16()).bind().initial()


def test_preprocessing_is_reported() -> None:
    data = replace(points(10), x=np.full((10, 4), 9.0))
    task = replace(TOY, preprocess=Preprocess(bounds=(0, 3))).bind(data, data.take(np.arange(2)))
    assert (task.report.rows, task.report.values_clipped, task.held_out_report.values_clipped) == (10, 40, 8)


def test_settings_are_checked() -> None:
    assert TOY.recipe({"l2": 1}) == Recipe(lr=0.5, batch_size=8, l2=1.0)
    for settings_, message in [
        ({"learning_rate": 1.0}, r"train\.learning_rate is unknown.*there are lr, batch_size"),
        ({"batchsize": 1}, r"did you mean train\.batch_size\?"),
        ({"lr": 0.0}, r"train\.lr = 0\.0 must be above 0"),
        ({"lr": float("inf")}, r"train\.lr = inf must be above 0 and at most 1e\+06"),
        ({"lr": "0.1"}, "is not a number"),
        ({"lr": True}, "is not a number"),
        ({"batch_size": 2.5}, "is not a whole number"),
        ({"local_epochs": 0}, "must be 1 or more"),
        ({"momentum": 1.0}, r"must be in \[0, 1\)"),
        ({"l2": float("nan")}, r"must be 0 to 1e\+06"),
    ]:
        with pytest.raises(ConfigError, match=message):
            recipe(settings_)  # type: ignore[arg-type]


# Federated standardisation


def standardising() -> nn.Module:
    return nn.Sequential(OrderedDict(scaler=FederatedScaler(3), linear=nn.Linear(3, 2)))


SCALED = TaskDefinition(
    name="scaled",
    model=standardising,
    load=points,
    preprocess=Preprocess(missing="keep", reference=Reference((100, 0, 0), (50, 1, 1))),
    defaults={"lr": 0.1},
)


def measurements(n: int, middle: float, seed: int) -> Dataset:
    """Three columns: a large one with gaps, a small one, and one that never changes."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.normal(middle, 30, n), rng.normal(0.5, 2, n), np.full(n, 0.25)], axis=1)
    x[rng.random(n) < 0.3, 0] = np.nan
    return Dataset(x, rng.integers(2, size=n), columns=("large", "small", "same"))


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_averaged_moments_are_the_pooled_moments(sizes: list[int], seed: int) -> None:
    sites = [measurements(n, 80 + 20 * k, seed + k) for k, n in enumerate(sizes)]
    pooled = Dataset(np.concatenate([s.x for s in sites]), np.concatenate([s.y for s in sites]))
    start = SCALED.bind().initial()
    results = [SCALED.bind(site).train(start, config(1)) for site in sites]
    together = SCALED.bind(pooled).train(start, config(1)).arrays
    for name in ("scaler.mean", "scaler.mean_square", "scaler.observed"):
        mean = np.average([r.arrays[name] for r in results], axis=0, weights=[r.num_examples for r in results])
        np.testing.assert_allclose(mean, together[name], atol=1e-5)


def test_the_statistics_round_changes_the_statistics_alone_and_later_rounds_all_but_them() -> None:
    task = SCALED.bind(measurements(200, 80, 0))
    start = task.initial()
    first = task.train(start, config(1)).arrays
    changed = [name for name in start if not np.array_equal(start[name], first[name])]
    assert changed == ["scaler.mean", "scaler.mean_square", "scaler.observed"]
    second = task.train(first, config(2)).arrays
    changed = [name for name in start if not np.array_equal(first[name], second[name])]
    assert changed == ["linear.weight", "linear.bias"]


def test_the_scaler_standardises_fills_gaps_and_switches_constants_off() -> None:
    data = measurements(500, 80, 0)
    raw = ((data.x - [100, 0, 0]) / [50, 1, 1]).astype(np.float32)
    scaler = FederatedScaler(3)
    assert torch.equal(scaler(torch.ones(1, 3)), torch.ones(1, 3))  # before the statistics round
    scaler.load_state_dict({name: torch.from_numpy(moment) for name, moment in local_moments(raw).items()})
    scaled = scaler(torch.from_numpy(raw)).numpy()
    there = ~np.isnan(raw[:, 0])
    expected = (data.x[:, :2] - np.nanmean(data.x[:, :2], axis=0)) / np.nanstd(data.x[:, :2], axis=0)
    np.testing.assert_allclose(scaled[there, 0], expected[there, 0], atol=1e-4)
    np.testing.assert_allclose(scaled[:, 1], expected[:, 1], atol=1e-4)
    assert not scaled[~there, 0].any()  # a gap becomes the mean
    assert not scaled[:, 2].any()  # a constant says nothing


def test_a_column_that_nobody_observed_is_switched_off() -> None:
    scaler = FederatedScaler(2)
    moments = local_moments(np.array([[np.nan, 1], [np.nan, 3]], dtype=np.float32))
    scaler.load_state_dict({name: torch.from_numpy(moment) for name, moment in moments.items()})
    assert scaler(torch.tensor([[5.0, 2.0]])).tolist() == [[0, 0]]


def test_a_reference_that_is_far_off_names_the_column() -> None:
    definition = replace(SCALED, preprocess=Preprocess(missing="keep"))
    task = definition.bind(measurements(50, 500, 0))
    with pytest.raises(DataError, match=r"column 'large' has mean square .* correct preprocess\.reference"):
        task.train(task.initial(), config(1))


def test_gradients_and_federated_statistics_do_not_go_together() -> None:
    task = SCALED.bind(measurements(50, 80, 0))
    with pytest.raises(TaskError, match=r"use a strategy that sends models \(fedavg\)"):
        gradient_of(task, task.initial())


# FedProx: the proximal term, partial work, and what is told of it


def descended(data: Dataset, start: Arrays, steps: int, lr: float, mu: float, momentum: float = 0.0) -> Arrays:
    """Least squares by hand, in float64: w <- w - lr v, v <- momentum v + grad + mu (w - x)."""
    x, y = data.x.astype(np.float64), data.y.astype(np.float64)
    origin = np.append(start["weight"][0], start["bias"]).astype(np.float64)
    w, v, rows = origin.copy(), np.zeros_like(origin), np.column_stack([x, np.ones(len(x))])
    for _ in range(steps):
        v = momentum * v + 2 * rows.T @ (rows @ w - y) / len(y) + mu * (w - origin)
        w = w - lr * v
    return {"weight": w[None, :-1], "bias": w[-1:]}


LINE = TaskDefinition(name="line", model=lambda: nn.Linear(4, 1), load=points, loss="mse", metric="rmse")
PROXIMAL = {"lr": 0.05, "batch_size": 0, "local_epochs": 6, "mu": 2.0, "momentum": 0.5}


def check_proximal() -> None:
    data = replace(points(), y=points().x[:, 1])
    task = LINE.bind(data)
    start = task.initial()
    end = task.train(start, config(**PROXIMAL)).arrays
    wanted = descended(data, start, 6, 0.05, 2.0, 0.5)
    for name, values in wanted.items():
        np.testing.assert_allclose(end[name], values, atol=1e-6)
    normed = replace(TOY, model=with_norm).bind(points())
    plain, pulled = (
        normed.train(normed.initial(), config(1, lr=1e-9, batch_size=0, mu=mu)).arrays for mu in (0.0, 1e6)
    )
    np.testing.assert_array_equal(plain["1.running_mean"], pulled["1.running_mean"])


def test_the_proximal_term_pulls_to_where_the_round_began() -> None:
    check_proximal()


def toward_the_moving_w(module: nn.Module, mu: float, origin: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters() if mu else ():
        parameter.grad.add_(parameter.detach() - origin[name], alpha=mu)
        origin[name] = parameter.detach().clone()


def twice_as_strong(module: nn.Module, mu: float, origin: dict[str, Tensor]) -> None:
    """mu ||w - x||^2 without the half."""
    for name, parameter in module.named_parameters() if mu else ():
        parameter.grad.add_(parameter.detach() - origin[name], alpha=2 * mu)


def of_the_norm(module: nn.Module, mu: float, origin: dict[str, Tensor]) -> None:
    """mu / 2 ||w - x||, not squared."""
    for name, parameter in module.named_parameters() if mu else ():
        parameter.grad.add_((parameter.detach() - origin[name]).sign(), alpha=mu / 2)


def away(module: nn.Module, mu: float, origin: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters() if mu else ():
        parameter.grad.add_(origin[name] - parameter.detach(), alpha=mu)


def with_buffers(module: nn.Module, mu: float, origin: dict[str, Tensor]) -> None:
    pull_back(module, mu, origin)
    for buffer in module.buffers() if mu else ():
        if buffer.is_floating_point():
            buffer.sub_(buffer, alpha=0.5)


pull_back = torch_task.pull_back


@pytest.mark.parametrize("mistake", [toward_the_moving_w, twice_as_strong, of_the_norm, away, with_buffers])
def test_a_mistake_in_the_proximal_term_is_caught(mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_task, "pull_back", mistake)
    with pytest.raises(AssertionError):
        check_proximal()


def impulse_norm(steps: int, lr: float, mu: float, momentum: float) -> float:
    """The 1-norm of a_i: how much each step's gradient moves the parameters by the end, one gradient at a time."""

    def moved_by(step: int) -> float:
        speed = moved = 0.0
        for k in range(steps):
            speed = momentum * speed + (k == step) - mu * lr * moved
            moved += speed
        return abs(moved)

    return sum(moved_by(step) for step in range(steps))


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 60), momentum=st.floats(0, 0.95), pull=st.floats(0, 1))
def test_effective_steps_are_those_of_fednova(steps: int, momentum: float, pull: float) -> None:
    plain, heavy, held = (
        Recipe(lr=0.1), Recipe(lr=0.1, momentum=momentum), Recipe(lr=0.1, mu=10 * pull)
    )  # fmt: skip
    assert plain.effective_steps(steps) == steps
    rho = momentum
    by_paper = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    assert heavy.effective_steps(steps) == pytest.approx(by_paper)
    if pull > 0.01:
        assert held.effective_steps(steps) == pytest.approx((1 - (1 - pull) ** steps) / pull)
    both = Recipe(lr=0.1, mu=0.5, momentum=0.5)
    assert both.effective_steps(steps) == pytest.approx(impulse_norm(steps, 0.1, 0.5, 0.5))


def test_partial_work_is_told_truthfully() -> None:
    task = TOY.bind(points())  # 60 examples: 8 steps in an epoch
    start = task.initial()
    assert task.train(start, config(local_epochs=2)).effective_steps == 16
    assert task.train(start, config(local_epochs=2, max_steps=5)).effective_steps == 5
    ticks = iter(range(100))
    budget = replace(config(local_epochs=2, max_seconds=3.0), clock=lambda: float(next(ticks)))
    part = task.train(start, budget)
    assert part.effective_steps == 3
    assert part.num_examples == 60  # the weight is that of the data, not of the work
    assert same(part.arrays, task.train(start, config(local_epochs=2, max_steps=3)).arrays)
    at_once = replace(config(max_seconds=1e-9), clock=lambda: float(next(ticks)))
    assert task.train(start, at_once).effective_steps == 1
    assert same(SCALED.bind(measurements(50, 80, 0)).initial(), SCALED.bind().initial())
    assert SCALED.bind(measurements(50, 80, 0)).train(SCALED.bind().initial(), config(1)).effective_steps == 1


def test_a_pull_that_overshoots_is_refused() -> None:
    for wrong, message in (
        ({"mu": 3.0, "lr": 0.5}, r"train\.mu = 3\.0 must be 0 to 1 / train\.lr = 2, or it overshoots"),
        ({"mu": -1.0}, r"train\.mu"),
        ({"max_seconds": -1.0}, r"train\.max_seconds = -1\.0 must be 0 \(no limit\) or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe(wrong)
