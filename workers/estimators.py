"""Estimators for tables that need no gradient descent, only sums: regression, naive Bayes, k-means, PCA. No torch.

Each participant answers with means over its own examples. FedAvg weighs by num_examples, and the mean of means so
weighted is the mean over everybody's examples. So one round gives what all data in one place would give, whatever
the partition, to the rounding of the aggregator's sums; k-means takes a round for each of Lloyd's steps.

What is a penalty or a smoothing is per example, because a weighted mean does not tell how many examples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError, DataError, TaskError
from workers.data import Dataset
from workers.definition import Prediction
from workers.preprocess import Preprocess, PreprocessReport, prepare
from workers.task import Arrays, Evaluation, Scalar, TrainConfig, TrainResult

LARGEST_MEAN = 1000.0  # aggregators refuse values above 1024
NOBODY = 1e-7  # a share below this is none: the aggregator's sums round
LEAST_LOG_CHANCE = float(np.log(np.finfo(np.float64).eps))  # as scikit-learn's log_loss
CHUNK_ROWS = 2048

Floats = NDArray[np.float64]


class Estimator(Protocol):
    """A model whose arrays (float64) are means over examples; `x` is (n, features) float64, `y` is (n,)."""

    @property
    def metric(self) -> str:
        """What tells how good it is: "accuracy", "rmse" or "loss"."""

    @property
    def rounds(self) -> int:
        """How many rounds it takes."""

    def initial(self) -> Arrays:
        """Zeros."""

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:
        """This participant's arrays, given everybody's so far."""

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:
        """Metrics as means over these examples."""

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, Floats | None]:
        """For each row a value (n,), and for classes their probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorDefinition:
    """What everybody agrees on: name, estimator and data. `load`, `preprocess`, `held_out` and `seed` are as in a
    `TaskDefinition`; preprocessing scales, by public figures, so that values have a magnitude of about 1."""

    name: str
    estimator: Estimator
    load: Callable[..., Dataset]
    summary: str = ""
    preprocess: Preprocess = field(default_factory=Preprocess)
    held_out: float = 0.2
    seed: int = 42

    @property
    def metric(self) -> str:
        return self.estimator.metric

    @property
    def defaults(self) -> Mapping[str, Scalar]:
        """There is nothing to tune."""
        return {}

    def check(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> None:  # noqa: ARG002
        """Raises ConfigError if there are any."""
        if settings:
            raise ConfigError(
                f"task {self.name!r} has no training settings: leave train.{min(settings)} out; what it can be "
                "told is in its estimator"
            )

    def run_defaults(self) -> dict[str, Scalar]:
        return {"stop.rounds": self.estimator.rounds}

    def of_rank(self, rank: int) -> EstimatorDefinition:
        """Raises ConfigError for any but 0: it has no adapters."""
        if rank:
            raise ConfigError(f"task {self.name!r} has no LoRA adapters: leave site.lora_rank out")
        return self

    def on(self, device: str, processes: int = 1) -> EstimatorDefinition:
        """Raises ConfigError for any but the CPU, and one process."""
        if device not in ("", "auto", "cpu") or processes > 1:
            raise ConfigError(
                f"task {self.name!r} computes on the CPU in one process: leave site.device and site.processes out"
            )
        return self

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> EstimatorTask:
        """One participant's task. Without `train` it can only make the initial model and evaluate.

        Raises DataError if the training data is empty, before or after preprocessing, or does not fit.
        """
        return EstimatorTask(self, train, held_out, participant)

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """Raises TaskError if the estimator predicts nothing, DataError if the inputs do not fit."""
        numbered = Dataset(inputs.x, np.arange(len(inputs)), inputs.name, columns=inputs.columns)
        prepared, _ = prepare(numbered, self.preprocess, np.float64)
        values, chances = self.estimator.predict(arrays, prepared.x)
        known = [None] * len(prepared) if chances is None else chances.tolist()
        return [Prediction(*one) for one in zip(prepared.y.tolist(), values.tolist(), known, strict=True)]


class EstimatorTask:
    """The `LearningTask` of one participant. `report` says what preprocessing did."""

    def __init__(
        self, definition: EstimatorDefinition, train: Dataset | None, held_out: Dataset | None, participant: str
    ) -> None:
        self.definition, self.name = definition, definition.name
        self._rows, self.report = _rows(train, definition)
        self._held_out, _ = _rows(held_out, definition)
        self.num_examples = len(self._rows) if self._rows else 0
        if train is not None and not self.num_examples:
            raise DataError(
                f"{participant} has no example for task {self.name!r} ({len(train)} rows came in, "
                f"{self.report.rows_dropped} were dropped): give it data, check preprocess.missing, or leave it out"
            )

    def initial(self) -> Arrays:
        return self.definition.estimator.initial()

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        """The means over all local examples. Raises TaskError if a gradient is wanted, DataError if a mean is too
        large to travel."""
        self.definition.check(config.settings)
        if not self._rows:
            raise TaskError(f"task {self.name!r} was bound without training data: it can only evaluate")
        if config.wants == "gradient":
            raise TaskError(f"task {self.name!r} sends means and no gradients: use strategy fedavg")
        self._demand_like_initial(arrays)
        means = self.definition.estimator.means(arrays, self._rows.x, self._rows.y)
        for name, mean in means.items():
            _demand_small(name, mean, self._rows)
        return TrainResult(means, self.num_examples, effective_steps=1.0)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        """Raises TaskError if there is nothing to evaluate on, or the arrays do not fit."""
        if not self._held_out:
            raise TaskError(f"task {self.name!r}: no held-out examples to evaluate on: bind it with `held_out`")
        self._demand_like_initial(arrays)
        metrics = self.definition.estimator.measure(arrays, self._held_out.x, self._held_out.y)
        return Evaluation(metrics, len(self._held_out))

    def _demand_like_initial(self, arrays: Arrays) -> None:
        wanted = {name: (array.shape, array.dtype) for name, array in self.initial().items()}
        if {name: (array.shape, array.dtype) for name, array in arrays.items()} != wanted:
            raise TaskError(f"the arrays are not those of task {self.name!r}: do both sides run the same task?")


def _rows(dataset: Dataset | None, definition: EstimatorDefinition) -> tuple[Dataset | None, PreprocessReport]:
    if dataset is None:
        return None, PreprocessReport()
    prepared, report = prepare(dataset, definition.preprocess, np.float64)
    if prepared.x.ndim != 2 or np.isnan(prepared.x).any():
        raise DataError(
            f"data set {dataset.name!r}: an estimator needs inputs (n, columns) without missing values, not "
            f"{prepared.x.shape}: set preprocess.missing to 'drop', or leave columns out with preprocess.keep"
        )
    return prepared, report


def _demand_small(name: str, mean: Floats, rows: Dataset) -> None:
    if (largest := float(np.abs(mean).max())) > LARGEST_MEAN:
        column = int(np.square(rows.x).mean(axis=0).argmax())
        column_name = repr(rows.columns[column]) if rows.columns else f"number {column}"
        raise DataError(
            f"data set {rows.name!r}: {name!r} has a mean of {largest:.3g}, above {LARGEST_MEAN:g}, most of it "
            f"from column {column_name} or the target: scale by public figures (preprocess.reference, target_scale)"
        )


def _demand_columns(x: Floats, features: int) -> None:
    if x.shape[1] != features:
        raise DataError(f"the inputs have {x.shape[1]} columns, but the estimator was made for {features}")


# -- regression --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """prediction = x @ coefficients + intercept, of prepared inputs, in the target's own unit."""

    coefficients: Floats
    intercept: float


@dataclass(frozen=True, slots=True)
class Ridge:
    """Linear regression with the penalty l2 * ||w||^2 on the mean squared error; the intercept is free.

    With n examples that is scikit-learn's Ridge(alpha=l2 * n); l2 = 0 is LinearRegression. `target_mean` and
    `target_scale` are public figures that bring targets to a magnitude of about 1 while they travel.
    """

    features: int
    l2: float = 0.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    metric: str = "rmse"
    rounds: int = 1

    def initial(self) -> Arrays:
        d = self.features
        shapes = {"mean": (d,), "products": (d, d), "target": (), "with_target": (d,)}
        return {name: np.zeros(shape) for name, shape in shapes.items()}

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:  # noqa: ARG002 - from data alone
        _demand_columns(x, self.features)
        t = (y.astype(np.float64) - self.target_mean) / self.target_scale
        return {
            "mean": x.mean(axis=0),
            "products": x.T @ x / len(x),
            "target": np.asarray(t.mean()),
            "with_target": x.T @ t / len(x),
        }

    def fitted(self, arrays: Arrays) -> Line:
        """(C + l2 I) w = c, with covariances C of the inputs and c with the target."""
        mean = arrays["mean"]
        spread = arrays["products"] - np.outer(mean, mean) + self.l2 * np.eye(self.features)
        common = arrays["with_target"] - mean * arrays["target"]
        weights = np.linalg.lstsq(spread, common)[0]
        intercept = self.target_mean + self.target_scale * float(arrays["target"] - mean @ weights)
        return Line(self.target_scale * weights, intercept)

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:
        error = self.predict(arrays, x)[0] - y
        mse = float(np.square(error).mean())
        return {"loss": mse / self.target_scale**2, "rmse": mse**0.5, "mae": float(np.abs(error).mean())}

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, None]:
        _demand_columns(x, self.features)
        line = self.fitted(arrays)
        return x @ line.coefficients + line.intercept, None


# -- naive Bayes -------------------------------------------------------------------------------------------------


def _by_class(x: Floats, y: NDArray[Any], classes: int) -> tuple[Floats, Floats]:
    """The share of each class (classes,), and its sum of x divided by all examples (classes, features)."""
    if not (np.issubdtype(y.dtype, np.integer) and y.min() >= 0 and y.max() < classes):
        raise DataError(f"the targets must be classes from 0 to {classes - 1}")
    member = (y[:, None] == np.arange(classes)).astype(np.float64)
    return member.mean(axis=0), member.T @ x / len(x)


def _judged(joint: Floats, y: NDArray[Any]) -> dict[str, float]:
    chances = _log_chances(joint)
    loss = -np.maximum(chances[np.arange(len(y)), y], LEAST_LOG_CHANCE).mean()
    return {"loss": float(loss), "accuracy": float((joint.argmax(axis=1) == y).mean())}


def _log_chances(joint: Floats) -> Floats:
    top = joint.max(axis=1, keepdims=True)
    chances: Floats = joint - top - np.log(np.exp(joint - top).sum(axis=1, keepdims=True))
    return chances


def _chosen(joint: Floats) -> tuple[Floats, Floats]:
    return joint.argmax(axis=1).astype(np.float64), np.exp(_log_chances(joint).max(axis=1))


@dataclass(frozen=True, slots=True)
class GaussianBayes:
    """Naive Bayes with a normal distribution of each feature in each class: scikit-learn's GaussianNB.

    `smoothing` times the largest variance of a feature is added to all variances (var_smoothing). A class that
    nobody has is never predicted.
    """

    features: int
    classes: int
    smoothing: float = 1e-9
    metric: str = "accuracy"
    rounds: int = 1

    def initial(self) -> Arrays:
        shape = (self.classes, self.features)
        return {"share": np.zeros(self.classes), "sum": np.zeros(shape), "sum_of_squares": np.zeros(shape)}

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:  # noqa: ARG002 - from data alone
        _demand_columns(x, self.features)
        share, total = _by_class(x, y, self.classes)
        return {"share": share, "sum": total, "sum_of_squares": _by_class(np.square(x), y, self.classes)[1]}

    def fitted(self, arrays: Arrays) -> tuple[Floats, Floats]:
        """Mean and variance of each feature in each class, both (classes, features)."""
        share = np.maximum(arrays["share"], NOBODY)[:, None]
        mean = arrays["sum"] / share
        overall = arrays["sum_of_squares"].sum(axis=0) - np.square(arrays["sum"].sum(axis=0))
        least = max(self.smoothing * float(overall.max()), np.finfo(np.float64).tiny)
        return mean, np.maximum(arrays["sum_of_squares"] / share - np.square(mean), 0.0) + least

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:
        return _judged(self._joint(arrays, x), y)

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, Floats]:
        return _chosen(self._joint(arrays, x))

    def _joint(self, arrays: Arrays, x: Floats) -> Floats:
        _demand_columns(x, self.features)
        mean, variance = self.fitted(arrays)
        likely = [
            -0.5 * (np.log(2 * np.pi * v).sum() + (np.square(x - m) / v).sum(axis=1))
            for m, v in zip(mean, variance, strict=True)
        ]
        return np.stack(likely, axis=1) + _log_prior(arrays["share"])


@dataclass(frozen=True, slots=True)
class MultinomialBayes:
    """Naive Bayes for counts and other values of at least 0: scikit-learn's MultinomialNB(alpha=smoothing * n)."""

    features: int
    classes: int
    smoothing: float = 1e-3
    metric: str = "accuracy"
    rounds: int = 1

    def initial(self) -> Arrays:
        return {"share": np.zeros(self.classes), "sum": np.zeros((self.classes, self.features))}

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:  # noqa: ARG002 - from data alone
        _demand_columns(x, self.features)
        if (x < 0).any():
            raise DataError("multinomial naive Bayes needs values of at least 0: use preprocess.bounds")
        share, total = _by_class(x, y, self.classes)
        return {"share": share, "sum": total}

    def fitted(self, arrays: Arrays) -> Floats:
        """The logarithm of each feature's share in each class (classes, features)."""
        smoothed = np.maximum(arrays["sum"], 0.0) + self.smoothing
        found: Floats = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
        return found

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:
        return _judged(self._joint(arrays, x), y)

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, Floats]:
        return _chosen(self._joint(arrays, x))

    def _joint(self, arrays: Arrays, x: Floats) -> Floats:
        _demand_columns(x, self.features)
        joint: Floats = x @ self.fitted(arrays).T + _log_prior(arrays["share"])
        return joint


def _log_prior(share: Floats) -> Floats:
    """Of a class that nobody has it is so low that it is never chosen, and finite."""
    return np.where(share > NOBODY, np.log(np.maximum(share, NOBODY)), -1e300)


# -- k-means -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KMeans:
    """Lloyd's algorithm (1982): one step a round, the same as on all data in one place.

    Round 1 is for means and variances. From these and `seed` everybody draws the same first centres (normal, each
    feature by itself), so no example is shown. A centre without any example goes beside the largest cluster's.
    """

    features: int
    clusters: int
    seed: int = 42
    metric: str = "loss"
    rounds: int = 20

    def initial(self) -> Arrays:
        d, k = self.features, self.clusters
        shapes = {"mean": (d,), "mean_square": (d,), "share": (k,), "sum": (k, d)}
        return {name: np.zeros(shape) for name, shape in shapes.items()}

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:  # noqa: ARG002 - needs no targets
        _demand_columns(x, self.features)
        found = self.initial() | {"mean": x.mean(axis=0), "mean_square": np.square(x).mean(axis=0)}
        if arrays["mean_square"].any():
            nearest = np.concatenate([d.argmin(axis=1) for d in self._distances(arrays, x)])
            found["share"], found["sum"] = _by_class(x, nearest, self.clusters)
        return found

    def fitted(self, arrays: Arrays) -> Floats:
        """The centres (clusters, features)."""
        mean, share = arrays["mean"], arrays["share"]
        spread = np.sqrt(np.maximum(arrays["mean_square"] - np.square(mean), 0.0))
        drawn = spread * np.random.default_rng(self.seed).normal(size=(self.clusters, self.features))
        if share.sum() < 0.5:  # nobody has counted yet
            first: Floats = mean + drawn
            return first
        centres = arrays["sum"] / np.maximum(share, NOBODY)[:, None]
        beside: Floats = centres[share.argmax()] + 0.1 * drawn
        found: Floats = np.where((share > NOBODY)[:, None], centres, beside)
        return found

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:  # noqa: ARG002
        """`loss`: the mean squared distance to the nearest centre."""
        least = [d.min(axis=1) for d in self._distances(arrays, x)]
        return {"loss": float(np.concatenate(least).mean())}

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, None]:
        """The number of the nearest centre."""
        nearest = [d.argmin(axis=1) for d in self._distances(arrays, x)]
        return np.concatenate([*nearest, np.empty(0)]).astype(np.float64), None

    def _distances(self, arrays: Arrays, x: Floats) -> Iterator[Floats]:
        """Squared, of some rows at a time to each centre."""
        _demand_columns(x, self.features)
        centres = self.fitted(arrays)
        for start in range(0, len(x), CHUNK_ROWS):
            some = x[start : start + CHUNK_ROWS]
            yield np.stack([np.square(some - centre).sum(axis=1) for centre in centres], axis=1)


# -- principal components ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Components:
    """Directions (components, features) of length 1, the largest variance first; the variance along each, divided
    by n; and its share in the variance of all features. The largest number of each direction is positive."""

    mean: Floats
    directions: Floats
    variances: Floats
    shares: Floats

    def transform(self, x: Floats) -> Floats:
        """Prepared inputs (n, features) along the directions: (n, components)."""
        return (x - self.mean) @ self.directions.T


@dataclass(frozen=True, slots=True)
class PCA:
    """Principal components of the pooled covariance: scikit-learn's PCA."""

    features: int
    components: int
    metric: str = "loss"
    rounds: int = 1

    def initial(self) -> Arrays:
        return {"mean": np.zeros(self.features), "products": np.zeros((self.features, self.features))}

    def means(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> Arrays:  # noqa: ARG002 - from data alone
        _demand_columns(x, self.features)
        return {"mean": x.mean(axis=0), "products": x.T @ x / len(x)}

    def fitted(self, arrays: Arrays) -> Components:
        mean = arrays["mean"]
        variances, columns = np.linalg.eigh(arrays["products"] - np.outer(mean, mean))
        first = slice(None, -self.components - 1, -1)
        directions = columns.T[first]
        largest = directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)]
        whole = max(float(variances.sum()), np.finfo(np.float64).tiny)
        return Components(mean, directions * np.sign(largest)[:, None], variances[first], variances[first] / whole)

    def measure(self, arrays: Arrays, x: Floats, y: NDArray[Any]) -> dict[str, float]:  # noqa: ARG002
        """`loss`: the mean squared distance to what the components keep."""
        _demand_columns(x, self.features)
        found = self.fitted(arrays)
        missed = x - found.mean - found.transform(x) @ found.directions
        return {"loss": float(np.square(missed).sum(axis=1).mean())}

    def predict(self, arrays: Arrays, x: Floats) -> tuple[Floats, None]:  # noqa: ARG002 - as all estimators
        raise TaskError("PCA predicts nothing: use `fitted(arrays).transform(x)` from Python")
