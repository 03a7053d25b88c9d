"""The learning task of one participant that trains a large model, or adapters of it.

The same arrays, settings and seed give the same bits on the same kind of CPU with one torch thread. All tasks of
a process share the base model: who trains or evaluates has it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from broker.errors import ConfigError, DataError, TaskError
from workers.classes import Tally, tally
from workers.data import Dataset
from workers.definition import Prediction
from workers.hf.base import Base, Model, load
from workers.hf.recipe import Chosen
from workers.hf.text import IGNORED, LABELS, Examples, TextReport, classified, nothing, packed
from workers.imbalance import class_weights
from workers.lesson import Loss, weighted_cross_entropy
from workers.modules import seeded
from workers.optimisers import optimiser
from workers.predictions import predictions
from workers.recipe import ADAMW
from workers.task import Arrays, Evaluation, TrainConfig, TrainResult, WorkAbandoned
from workers.terms import add_penalty, correct, origin, pull_back
from workers.torch_task import batches

if TYPE_CHECKING:
    from workers.hf.definition import HfTask

EVALUATED_ROWS = 16  # examples in one pass that keeps no activations
LARGEST_EXPONENT = 700.0  # of which the exponential is finite


@dataclass(slots=True)
class Shared:
    """The model of a definition, loaded when it is first needed."""

    lock: RLock = field(default_factory=RLock)
    found: Model | None = None

    def get(self, base: Base) -> Model:
        with self.lock:
            if self.found is None:
                self.found = load(base)
            return self.found


class HfBound:
    """The `LearningTask` of one participant; `report` says what became of its texts."""

    def __init__(
        self, definition: HfTask, train: Dataset | None, held_out: Dataset | None, participant: str
    ) -> None:
        self.definition = definition
        self.name = definition.name
        self.model = definition.model()
        self.rows, self.report = self._examples(train)
        self._held_out, self.held_out_report = self._examples(held_out)
        self.num_examples = len(self.rows)
        if train is not None and not self.num_examples:
            raise DataError(f"{participant} has no example to train on for task {self.name!r}: give it data")

    def _examples(self, data: Dataset | None) -> tuple[Examples, TextReport]:
        if data is None:
            return nothing()
        make = classified if self.definition.kind == "classifier" else packed
        with self.model.lock:  # a tokenizer is told how to cut
            found = make(data, self.model.tokenizer, self.definition.max_length)
        if self.definition.kind == "classifier" and len(found[0]):
            low, high = int(found[0].targets.min()), int(found[0].targets.max())
            if low < 0 or high >= self.definition.classes:
                raise DataError(
                    f"data set {data.name!r} has classes {low} to {high}, and task {self.name!r} has "
                    f"{self.definition.classes}: set `classes`"
                )
        return found

    def initial(self) -> Arrays:
        """What of the base is trained, as the base has it; new parts as the definition's seed draws them."""
        return dict(self.model.initial)

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        """Gradient descent from `arrays`, or their mean gradient. The metric `loss` is the mean of each step's loss
        before it, by examples, or by tokens for a language model.

        Raises TaskError if the arrays are of another base or do not fit, or a loss is not finite, and WorkAbandoned
        when told to stop.
        """
        if not self.num_examples:
            raise TaskError(f"task {self.name!r} was bound without training data: it can only evaluate")
        chosen = self.definition.choose(config.settings)
        with self._loaded(arrays, chosen), seeded(config.seed):
            if config.wants == "gradient":
                return self._gradient(chosen)
            start_loss = self._measure(self.rows)[0] if config.wants == "delta+loss" else None
            self.model.module.train()
            return replace(self._descend(chosen, config), start_loss=start_loss)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        """The held-out examples' mean loss; accuracy and what the mistakes come to class by class, or perplexity:
        the exponential of the mean loss over tokens.

        Raises TaskError if there are none, or the arrays do not fit.
        """
        if not len(self._held_out):
            raise TaskError(
                f"task {self.name!r}: no held-out examples to evaluate on: set evaluation.mode = central"
            )
        with self._loaded(arrays):
            loss, mistakes = self._measure(self._held_out)
        if not math.isfinite(loss):
            raise self._diverged(loss)
        if mistakes is None:
            metrics = {"loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
            return Evaluation(metrics, len(self._held_out))
        accuracy = float(mistakes.right.sum() / mistakes.true.sum())
        metrics = {"loss": loss, "accuracy": accuracy, **mistakes.metrics()}
        return Evaluation(metrics, len(self._held_out), mistakes.confusion)

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """The class of each text. Raises ConfigError for a language model."""
        if self.definition.kind == "causal":
            raise ConfigError(
                f"task {self.name!r} is a language model, which predicts no classes: `fluffle generate`"
            )
        rows, _ = self._examples(inputs)
        with self._loaded(arrays), torch.inference_mode():
            outputs = [self._outputs(self._batch(rows, part)) for part in _parts(len(rows))]
        found = torch.cat(outputs).double() if outputs else torch.empty(0, 1)
        return list(predictions(np.arange(len(rows)), found, "accuracy"))

    def with_flipped_labels(self) -> HfBound:
        """The same task with labels y -> classes - 1 - y to train on. Raises ConfigError without classes."""
        if self.definition.kind == "causal":
            raise ConfigError(f"task {self.name!r} has no classes: its labels cannot be flipped")
        flipped = copy(self)
        flipped.rows = replace(self.rows, targets=self.definition.classes - 1 - self.rows.targets)
        return flipped

    @contextmanager
    def _loaded(self, arrays: Arrays, chosen: Chosen | None = None) -> Iterator[None]:
        """The model with these arrays, for nobody else; evaluating unless it is told to train."""
        module: Any = self.model.module
        with self.model.lock:
            self.model.load(arrays)
            module.eval()
            checkpointing = chosen is not None and chosen.tuning.checkpointing
            if checkpointing:
                module.activation_checkpointing_enable({"use_reentrant": False})
            try:
                with self._autocast(chosen):
                    yield
            finally:
                if checkpointing:
                    module.activation_checkpointing_disable()

    def _autocast(self, chosen: Chosen | None) -> Any:
        is_mixed = chosen is not None and chosen.tuning.precision == "bfloat16"
        return torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()

    def _descend(self, chosen: Chosen, config: TrainConfig) -> TrainResult:
        plain, tuning, model = chosen.recipe, chosen.tuning, self.model
        steps = optimiser(plain, model, config.state)
        scales = tuning.scales(config.round, chosen.steps(self.num_examples))
        start = origin(model, config) if plain.mu else {}
        correction = {name: torch.from_numpy(array) for name, array in config.correction.items()}
        loss, began = self._loss(chosen), config.clock()
        losses: list[tuple[float, int]] = []
        for batch in batches(self.num_examples, plain, config.seed, self._labels):
            if config.should_stop():
                raise WorkAbandoned(f"task {self.name!r}: told to stop after {len(losses)} steps")
            losses.append(self._backward(batch, chosen, loss))
            pull_back(model, plain.mu, start)
            correct(model, correction)
            if tuning.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters.values(), tuning.clip)
            steps.step(model, scales[min(len(losses), len(scales)) - 1])
            if plain.max_seconds and config.clock() - began >= plain.max_seconds:
                break
        taken = [scales[min(step, len(scales) - 1)] for step in range(len(losses))]
        return replace(self._trained(losses, taken, chosen), state=steps.state())

    def _trained(self, losses: Sequence[tuple[float, int]], taken: Sequence[float], chosen: Chosen) -> TrainResult:
        arrays = self.model.arrays()
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise self._diverged(math.nan)
        total = sum(weight for _, weight in losses)
        plain, tuning = chosen.recipe, chosen.tuning
        adamw = plain.optimiser == ADAMW
        return TrainResult(
            arrays,
            self.num_examples,
            {"loss": math.fsum(loss * weight for loss, weight in losses) / total},
            # a clipped gradient moves less than it says
            effective_steps=0.0 if adamw or tuning.clip else plain.effective_steps(len(taken), taken),
            step_sum=0.0 if tuning.clip else plain.lr * math.fsum(taken),
            buffers=frozenset({self.model.mark}),
        )

    def _gradient(self, chosen: Chosen) -> TrainResult:
        """The mean gradient over all local examples, with the penalty's; what dropout leaves out is drawn."""
        self.model.module.train()
        loss, _ = self._backward(torch.arange(self.num_examples), chosen, self._loss(chosen))
        gradients = {name: np.zeros_like(array) for name, array in self.model.initial.items()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.numpy().copy()
        return TrainResult(gradients, self.num_examples, {"loss": loss})

    def _backward(self, batch: Tensor, chosen: Chosen, loss: Loss) -> tuple[float, int]:
        """Leaves the gradient of the mean loss over these examples in the model; returns that loss, and how many
        examples or tokens it is the mean of. Raises TaskError if it is not finite."""
        self.model.module.zero_grad()
        whole, total = self._weight(self.rows, batch), 0.0
        for part in torch.split(batch, chosen.tuning.micro_batch or len(batch)):
            share = self._part(part, loss) * (self._weight(self.rows, part) / whole)
            share.backward()  # type: ignore[no-untyped-call]
            total += share.item()
        if not math.isfinite(total):
            raise self._diverged(total, chosen)
        add_penalty(self.model, chosen.recipe.l2)
        return total, whole

    def _part(self, rows: Tensor, loss: Loss) -> Tensor:
        batch = self._batch(self.rows, rows)
        return loss(self._outputs(batch), self._targets(self.rows, rows, batch))

    def _batch(self, examples: Examples, rows: Tensor) -> dict[str, Tensor]:
        return examples.batch(rows, self.model.tokenizer.pad_token_id or 0)

    def _outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits in float32: (n, classes), or (tokens, vocabulary) of every token but the last of each example."""
        inputs = {name: values for name, values in batch.items() if name != LABELS}
        try:
            logits: Tensor = self.model.module(**inputs).logits.float()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = tuple(next(iter(inputs.values())).shape)
            raise TaskError(f"task {self.name!r}: the model failed on tokens of shape {shape}: {error}") from error
        if self.definition.kind == "classifier":
            return logits
        length = batch[LABELS].shape[1]  # learned prompts come before
        return logits[:, -length:-1].flatten(0, 1)

    def _targets(self, examples: Examples, rows: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return examples.targets[rows] if self.definition.kind == "classifier" else batch[LABELS][:, 1:].flatten()

    def _weight(self, examples: Examples, rows: Tensor) -> int:
        return len(rows) if self.definition.kind == "classifier" else int(examples.targets[rows].sum())

    @property
    def _labels(self) -> Tensor | None:
        return self.rows.targets if self.definition.kind == "classifier" else None

    def _loss(self, chosen: Chosen) -> Loss:
        plain = chosen.recipe
        if not plain.class_weights and not plain.focal_gamma:
            return _cross_entropy
        form = plain.class_weights
        weights = torch.from_numpy(class_weights(self.rows.targets.numpy(), form)) if form else None
        return weighted_cross_entropy(weights, plain.focal_gamma)

    def _measure(self, examples: Examples) -> tuple[float, Tally | None]:
        """The mean loss, and which classes were mistaken. The module is as it is for evaluation."""
        losses: list[tuple[float, int]] = []
        mistakes: Tally | None = None
        with torch.inference_mode():
            for rows in _parts(len(examples)):
                batch = self._batch(examples, rows)
                outputs, targets = self._outputs(batch), self._targets(examples, rows, batch)
                losses.append((_cross_entropy(outputs, targets).item(), self._weight(examples, rows)))
                if self.definition.kind == "classifier":
                    found = tally(targets.numpy(), outputs.argmax(dim=1).numpy(), outputs.shape[1])
                    mistakes = found if mistakes is None else mistakes + found
        total = sum(weight for _, weight in losses)
        return math.fsum(loss * weight for loss, weight in losses) / total, mistakes

    def _diverged(self, loss: float, chosen: Chosen | None = None) -> TaskError:
        rate = f" with train.lr = {chosen.recipe.lr:g}" if chosen else ""
        return TaskError(f"task {self.name!r}: the loss is {loss}{rate}: lower train.lr, or set train.clip = 1")


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=IGNORED)


def _parts(examples: int) -> Sequence[Tensor]:
    return torch.split(torch.arange(examples), EVALUATED_ROWS) if examples else ()
