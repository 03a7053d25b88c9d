"""A learning task out of an `nn.Module`, a loss, data and preprocessing.

What a user writes is one `TaskDefinition`; `definition.bind(train, held_out)` is one participant's task.
Everything is a function of the arrays and the seed that come in: the same task on the same kind of CPU with
one torch thread gives the same bits. Dropout draws from torch's generator, which is seeded and put back.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from broker.errors import ConfigError, DataError, TaskError
from workers.augment import IMAGE_DIMENSIONS, Augment
from workers.classes import Tally, tally
from workers.data import Dataset
from workers.definition import Prediction
from workers.descent import Descent, Moved, digest_of
from workers.devices import find, moved
from workers.imbalance import class_weights, resampled
from workers.lesson import Lesson, Loss, weighted_cross_entropy
from workers.modules import arrays_of, buffer_patterns, build, load_arrays, seeded, views
from workers.optimisers import optimiser
from workers.predictions import outputs_of, predictions
from workers.preprocess import Preprocess, PreprocessReport, prepare
from workers.recipe import Recipe, recipe
from workers.scaler import STATISTICS_ROUND, FederatedScaler, local_moments
from workers.task import Arrays, Evaluation, Scalar, TrainConfig, TrainResult, WorkAbandoned
from workers.terms import add_penalty, correct, origin, pull_back

LESSON_DRAWS = 4  # tells a lesson's random numbers from those that shuffle
CHUNK_ROWS = 2048  # most examples in one pass through the model, so that full batches fit into memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDefinition:
    """What everybody agrees on: name, model, data, loss, metric and default training settings.

    `model` makes the module; its parameters and buffers travel under their `state_dict` names. If it takes an
    argument, that is what `site.lora_rank` says, where that is set. `load` gets the
    whole data set; if it takes an argument, that is what `site.data` says: where one participant's own is.
    `loss` is "cross-entropy", "mse" or a function of (outputs, targets) that gives the mean over the examples as
    a scalar. `metric` "accuracy" adds accuracy, macro_f1 and macro_recall to evaluations, "rmse" rmse and mae.
    `defaults` are training settings (see `Recipe`). `held_out` is the share of examples nobody trains on; `seed`
    draws the initial model and the held-out examples. `device` is where it trains and evaluates: `cpu`, `cuda`,
    `cuda:N`, `mps` or `auto`, the best there is.
    """

    name: str
    model: Callable[..., nn.Module]
    load: Callable[..., Dataset]
    summary: str = ""
    loss: Literal["cross-entropy", "mse"] | Loss = "cross-entropy"
    metric: Literal["accuracy", "rmse"] = "accuracy"
    preprocess: Preprocess = field(default_factory=Preprocess)
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    held_out: float = 0.2
    seed: int = 42
    device: str = "cpu"

    def recipe(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> Recipe:
        """The defaults with these settings over them. Raises ConfigError for one that cannot work, also for
        examples of the shape `inputs` if that is known."""
        chosen = recipe({**self.defaults, **settings})
        for name in chosen.remedies:
            if needs := self._lacks(name, inputs):
                raise ConfigError(f"setting train.{name} needs {needs}: leave it out for task {self.name!r}")
        return chosen

    def of_rank(self, rank: int) -> TaskDefinition:
        """The same with LoRA adapters of that rank, which `model` takes as its argument; 0: as they are. Raises
        ConfigError if it takes none."""
        if not rank:
            return self
        if not inspect.signature(self.model).parameters:
            raise ConfigError(
                f"site.lora_rank = {rank}: the model of task {self.name!r} takes no rank as its argument"
            )
        return replace(self, model=partial(self.model, rank))

    def on(self, device: str, processes: int = 1) -> TaskDefinition:
        """The same on another device; "": as it is. Raises ConfigError if that is not there, and for more than one
        process."""
        if processes > 1:
            raise ConfigError(f"site.processes = {processes}: task {self.name!r} trains in one: leave it out")
        return replace(self, device=str(find(device))) if device else self

    def _lacks(self, remedy: str, inputs: tuple[int, ...] | None) -> str:
        """What this task would have to be for a remedy; nothing if it is that."""
        if remedy in ("class_weights", "focal_gamma") and self.loss != "cross-entropy":
            return "classes and the loss 'cross-entropy'"
        if remedy == "sampling" and self.metric != "accuracy":
            return "classes, and the targets are measured numbers"
        if remedy == "augment" and inputs is not None and len(inputs) not in IMAGE_DIMENSIONS:
            return f"images, (height, width) or (channels, height, width), and examples have the shape {inputs}"
        return ""

    def check(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> None:
        """Raises ConfigError for training settings that cannot work, as `recipe` does."""
        self.recipe(settings, inputs)

    def run_defaults(self) -> dict[str, Scalar]:
        """What the model holds beside parameters is averaged plainly by every strategy."""
        buffers = buffer_patterns(build(self.model, self.seed))
        return {"strategy.buffers": ",".join(buffers)} if buffers else {}

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """What the model says of each input, in order; rows that preprocessing drops are left out."""
        module = self.model()
        load_arrays(module, arrays)
        prepared, _ = prepare(replace(inputs, y=np.arange(len(inputs))), self.preprocess)
        outputs = outputs_of(module, torch.from_numpy(prepared.x), CHUNK_ROWS)
        return list(predictions(prepared.y, outputs, self.metric))

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> TorchTask:
        """One participant's task. Without `train` it can only make the initial model and evaluate.

        Raises DataError if the training data is empty, before or after preprocessing, or does not fit.
        """
        return TorchTask(self, train, held_out, participant)


class TorchTask:
    """The `LearningTask` of one participant: it trains `module`, whatever that holds, on `rows`. `report` and
    `held_out_report` say what preprocessing did."""

    def __init__(
        self, definition: TaskDefinition, train: Dataset | None, held_out: Dataset | None, participant: str
    ) -> None:
        self.definition = definition
        self.name = definition.name
        self.device = find(definition.device)
        self.module = build(definition.model, definition.seed).to(self.device)
        self.rows, self.report = _rows(train, definition.preprocess)
        self._held_out, self.held_out_report = _rows(held_out, definition.preprocess)
        self.num_examples = len(self.rows)
        if train is not None and not self.num_examples:
            raise DataError(
                f"{participant} has no example to train on for task {self.name!r} ({len(train)} rows came in, "
                f"{self.report.rows_dropped} were dropped): give it data, check preprocess.missing, or leave it out"
            )

    def initial(self) -> Arrays:
        """The arrays of a new module under the definition's seed; torch's own random state stays as it was."""
        return views(build(self.definition.model, self.definition.seed))

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        """Gradient descent from `arrays`, or their mean gradient; in a statistics round, local moments instead.

        The L2 penalty is l2 / 2 * ||w||^2 over parameters with two or more dimensions: weights, not biases or
        norm layers. The proximal term is mu / 2 * ||w - x||^2 over all parameters, x as they came in. The metric
        `loss` is the mean loss without both, but as the remedies make it, before each step. Raises TaskError if the
        arrays do not fit or the loss is not finite, and WorkAbandoned when told to stop.
        """
        self._demand_rows()
        chosen = self.definition.recipe(config.settings, tuple(self.rows.x.shape[1:]))
        load_arrays(self.module, arrays)
        self.module.train()
        with seeded(config.seed, self.device):
            if config.wants == "gradient":
                return self._gradient(chosen, config.seed)
            start_loss = self._start_loss() if config.wants == "delta+loss" else None
            result = self._descend(chosen, config) if self.descends(config) else self._statistics()
            return replace(result, start_loss=start_loss)

    def _start_loss(self) -> float:
        """The mean loss over all local examples, without penalty, of the module as it is."""
        self.module.eval()
        with torch.inference_mode():
            loss = self._measure(self.rows).metrics["loss"]
        self.module.train()
        return loss

    def with_flipped_labels(self) -> TorchTask:
        """The same task with labels y -> classes - 1 - y to train on. Raises ConfigError without classes."""
        if self.definition.metric != "accuracy":
            raise ConfigError(f"task {self.name!r} has no classes: its labels cannot be flipped")
        self.module.eval()
        with torch.inference_mode():
            classes = self._forward(self.rows.x[:1], self.rows.y[:1])[0].shape[1]
        flipped = copy(self)
        flipped.rows = replace(self.rows, y=classes - 1 - self.rows.y)
        return flipped

    def descends(self, config: TrainConfig) -> bool:
        """Whether that asks for gradient descent, and neither for a gradient nor for statistics."""
        in_statistics = self._scaler_name() is not None and config.round == STATISTICS_ROUND
        return config.wants != "gradient" and not in_statistics

    def evaluate(self, arrays: Arrays) -> Evaluation:
        """Means over the held-out examples: loss (without penalty), and accuracy or mae; and rmse, or what the
        mistakes come to class by class (`classes.py`).

        Raises TaskError if there are none, the arrays do not fit, or a metric is not finite.
        """
        if not len(self._held_out):
            raise TaskError(
                f"task {self.name!r}: no held-out examples to evaluate on: bind the task with `held_out`, "
                "or set evaluation.mode = central"
            )
        load_arrays(self.module, arrays)
        self.module.eval()
        with torch.inference_mode():
            return self._measure(self._held_out)

    def _demand_rows(self) -> None:
        if not self.num_examples:
            raise TaskError(f"task {self.name!r} was bound without training data: it can only evaluate")

    def _descend(self, chosen: Recipe, config: TrainConfig) -> TrainResult:
        start = origin(self.module, config) if chosen.mu else {}  # before it goes on from where it was
        correction = {
            name: moved(torch.from_numpy(array), self.device) for name, array in config.correction.items()
        }
        descent, save = self._begun(chosen, config)
        steps, losses, began = descent.steps, descent.losses, config.clock() - descent.spent_s
        scales = chosen.scales(config.round, self.num_examples)
        for batch in islice(batches(self.num_examples, chosen, config.seed, self.rows.y), len(losses), None):
            if config.should_stop():
                raise WorkAbandoned(f"task {self.name!r}: told to stop after {len(losses)} steps")
            losses.append((self.backward(batch, chosen, descent.lesson), len(batch)))
            pull_back(self.module, chosen.mu, start)
            correct(self.module, correction)
            steps.step(self.module, scales[min(len(losses), len(scales)) - 1])
            spent_s = config.clock() - began
            if chosen.max_seconds and spent_s >= chosen.max_seconds:
                break
            save(spent_s)
        taken = [scales[min(step, len(scales) - 1)] for step in range(len(losses) * chosen.is_scheduled)]
        return replace(self.trained(arrays_of(self.module), losses, chosen, taken), state=steps.state())

    def _begun(self, chosen: Recipe, config: TrainConfig) -> tuple[Descent, Callable[[float], None]]:
        """Where descent begins, or goes on; and what is to be called after every step with the seconds so far."""
        held = Moved(partial(views, self.module), partial(load_arrays, self.module))
        steps = optimiser(chosen, self.module, config.state)
        descent = Descent(held, steps, self._lesson(chosen, config.seed), self.device)

        def of() -> NDArray[np.uint8]:
            return digest_of(f"{self.name} {chosen} {self.device.type}", (self.rows.x.numpy(), self.rows.y.numpy()))

        return descent, descent.begin(chosen.save_seconds, of, config)

    def trained(
        self, arrays: Arrays, losses: Sequence[tuple[float, int]], chosen: Recipe, taken: Sequence[float] = ()
    ) -> TrainResult:
        """What descent came to; `losses` are each step's mean loss and number of examples, `taken` its scale, if
        not 1. Raises TaskError if something is not finite."""
        if bad := [loss for loss, _ in losses if not math.isfinite(loss)]:
            raise self._diverged(f"the loss is {bad[0]}", chosen)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise self._diverged(f"{name} is not finite", chosen)
        examples = sum(count for _, count in losses)
        loss = math.fsum(loss * count for loss, count in losses) / examples
        return TrainResult(
            arrays, self.num_examples, {"loss": loss}, chosen.effective_steps(len(losses), taken),
            step_sum=chosen.lr * (math.fsum(taken) if taken else len(losses)), buffers=self._buffers,
        )  # fmt: skip

    def _lesson(self, chosen: Recipe, seed: int) -> Lesson | None:
        """How the remedies show examples; None if plainly. Raises ConfigError for what sequences cannot bear."""
        if self.rows.y.ndim > 1 and (unfit := {"sampling", "mixup"}.intersection(chosen.remedies)):
            raise ConfigError(
                f"setting train.{min(unfit)} needs one target for each example, and task {self.name!r} has "
                "sequences of them: leave it out"
            )
        if not set(chosen.remedies) - {"sampling"}:
            return None
        loss = self._loss
        if chosen.class_weights or chosen.focal_gamma:
            form, labels = chosen.class_weights, self.rows.y.flatten().numpy()
            weights = torch.from_numpy(class_weights(labels, form)) if form else None
            loss = weighted_cross_entropy(weights, chosen.focal_gamma)
        augment = Augment.parsed(chosen.augment) if chosen.augment else None
        return Lesson(loss, np.random.default_rng([seed, LESSON_DRAWS]), augment, chosen.mixup)

    @property
    def _loss(self) -> Loss:
        chosen = self.definition.loss
        return LOSSES[chosen] if isinstance(chosen, str) else chosen

    def _gradient(self, chosen: Recipe, seed: int) -> TrainResult:
        """The mean gradient over all local examples with the penalty's; zeros for buffers."""
        if chosen.sampling:
            raise TaskError(
                f"task {self.name!r}: train.sampling chooses the examples of steps, but a gradient is that of all: "
                "use train.class_weights, or a strategy that sends models (fedavg)"
            )
        if self._scaler_name() is not None:
            raise TaskError(
                f"task {self.name!r} standardises with federated statistics, which travel as model arrays and not "
                "as gradients: use a strategy that sends models (fedavg), or a fixed preprocess.reference"
            )
        loss = self.backward(torch.arange(self.num_examples), chosen, self._lesson(chosen, seed))
        gradients = {name: np.zeros_like(array) for name, array in views(self.module).items()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter.grad is not None:
                gradients[name] = parameter.grad.cpu().numpy().copy()
        return TrainResult(gradients, self.num_examples, {"loss": loss})

    def _statistics(self) -> TrainResult:
        scaler = self._scaler_name()
        arrays = arrays_of(self.module)
        for name, moment in local_moments(self.rows.x.numpy(), self.rows.columns).items():
            arrays[f"{scaler}{name}"] = moment
        self.module.eval()
        with torch.inference_mode():
            loss = self._measure(self.rows).metrics["loss"]
        return TrainResult(
            arrays, self.num_examples, {"loss": loss}, effective_steps=1.0, step_sum=math.inf, buffers=self._buffers
        )

    @property
    def _buffers(self) -> frozenset[str]:
        """What gradients do not move."""
        moved = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        return frozenset(self.module.state_dict().keys() - moved)

    def _scaler_name(self) -> str | None:
        """What the federated statistics' names begin with (`scaler.`); None if the model has none."""
        for name, module in self.module.named_modules():
            if isinstance(module, FederatedScaler):
                return f"{name}." if name else ""
        return None

    def backward(self, batch: Tensor, chosen: Recipe, lesson: Lesson | None = None) -> float:
        """Leaves the gradient of the mean loss over these examples, with the penalty's, in the module; returns
        that loss. Raises TaskError if it is not finite."""
        self.module.zero_grad()
        total = 0.0
        for chunk in torch.split(batch, CHUNK_ROWS):
            x, y = self.rows.x[chunk], self.rows.y[chunk]
            x, function = (x, None) if lesson is None else lesson(x)
            _, loss = self._forward(x, y, function)
            share = loss * (len(chunk) / len(batch))
            share.backward()  # type: ignore[no-untyped-call]
            total += share.item()
        if not math.isfinite(total):
            raise self._diverged(f"the loss is {total}", chosen)
        add_penalty(self.module, chosen.l2)
        return total

    def _forward(self, x: Tensor, y: Tensor, function: Loss | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and mean loss, by the definition's or another function. Raises TaskError, with shapes, for
        whatever goes wrong in the user's code."""
        function = function or self._loss
        with self._failures_named(x, y):
            x, y = moved(x, self.device), moved(y, self.device)
            outputs = self.module(x)
            loss = function(outputs, y)
            if loss.ndim:
                raise ValueError(f"the loss has shape {tuple(loss.shape)}, but must be a scalar: return its mean")
        return outputs, loss

    @contextmanager
    def _failures_named(self, x: Tensor, y: Tensor) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise TaskError(
                f"task {self.name!r}: model, loss or metric failed on inputs {tuple(x.shape)} {x.dtype} and "
                f"targets {tuple(y.shape)} {y.dtype}: {error}"
            ) from error

    def _measure(self, rows: Rows) -> Evaluation:
        parts: list[tuple[dict[str, float], int]] = []
        mistakes: Tally | None = None
        for x, y in zip(torch.split(rows.x, CHUNK_ROWS), torch.split(rows.y, CHUNK_ROWS), strict=True):
            outputs, loss = self._forward(x, y)
            outputs = outputs.cpu()
            with self._failures_named(x, y):
                metrics = METRICS[self.definition.metric](outputs, y)
                if self.definition.metric == "accuracy":
                    found = _tally(outputs, y)
                    mistakes = found if mistakes is None else mistakes + found
            parts.append(({"loss": loss.item(), **metrics}, len(x)))
        means = {name: math.fsum(part[name] * n for part, n in parts) / len(rows) for name in parts[0][0]}
        if "mse" in means:
            means["rmse"] = math.sqrt(means.pop("mse"))
        means |= mistakes.metrics() if mistakes is not None else {}
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise TaskError(f"task {self.name!r}: {', '.join(bad)} not finite: the model diverged, lower train.lr")
        return Evaluation(means, len(rows), None if mistakes is None else mistakes.confusion)

    def _diverged(self, what: str, chosen: Recipe) -> TaskError:
        return TaskError(
            f"task {self.name!r}: {what} with train.lr = {chosen.lr:g}: lower train.lr (try {chosen.lr / 10:g}), "
            "or look for missing values in the inputs"
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Preprocessed examples: `x` float32 (symbols: uint8 or int64), `y` int64 or float32; (n, ...) both."""

    x: Tensor
    y: Tensor
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)


def _rows(dataset: Dataset | None, steps: Preprocess) -> tuple[Rows, PreprocessReport]:
    if dataset is None:
        return Rows(torch.empty(0), torch.empty(0)), PreprocessReport()
    prepared, report = prepare(dataset, steps)
    return Rows(torch.from_numpy(prepared.x), torch.from_numpy(prepared.y), prepared.columns), report


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.reshape(targets.shape), targets)


def _accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"accuracy": (outputs.argmax(dim=1) == targets).double().mean().item()}


def _tally(outputs: Tensor, targets: Tensor) -> Tally:
    """Of sequences, outputs (n, classes, T), every position is an example."""
    true, predicted = targets.long().flatten().numpy(), outputs.argmax(dim=1).flatten().numpy()
    return tally(true, predicted, outputs.shape[1])


def _errors(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    error = (outputs.reshape(targets.shape) - targets).double()
    return {"mse": error.square().mean().item(), "mae": error.abs().mean().item()}


LOSSES: Mapping[str, Loss] = {"cross-entropy": _cross_entropy, "mse": _mse}
METRICS: Mapping[str, Callable[[Tensor, Tensor], dict[str, float]]] = {"accuracy": _accuracy, "rmse": _errors}


def batches(examples: int, chosen: Recipe, seed: int, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Indices of each step's examples: shuffled anew each local epoch, or all in order for a full batch; or as
    `chosen.sampling` draws them by their labels."""
    rng = np.random.default_rng(seed)
    size = chosen.batch_size or examples
    steps = 0
    for _ in range(chosen.local_epochs):
        if chosen.sampling and labels is not None:
            order = resampled(labels.numpy(), chosen.sampling, rng)
        else:
            order = np.arange(examples) if size >= examples else rng.permutation(examples)
        for batch in torch.split(torch.from_numpy(order), chosen.batch_size or len(order)):
            yield batch
            steps += 1
            if steps == chosen.max_steps:
                return
