"""The learning task of one participant that trains a large model, or adapters of it.

The same arrays, settings and seed give the same bits on the same kind of CPU with one torch thread. All tasks of
a process share the base model: who trains or evaluates has it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from broker.errors import ConfigError, DataError, TaskError
from workers.classes import Tally, tally
from workers.data import Dataset
from workers.definition import Prediction
from workers.descent import Descent, Moved, digest_of
from workers.devices import moved
from workers.hf.base import Base, Model, load
from workers.hf.crew import Crew, Work
from workers.hf.recipe import Chosen
from workers.hf.text import IGNORED, LABELS, Examples, TextReport, classified, nothing, packed
from workers.imbalance import class_weights
from workers.lesson import Loss, weighted_cross_entropy
from workers.modules import seeded
from workers.optimisers import optimiser
from workers.predictions import predictions
from workers.recipe import ADAMW, Recipe
from workers.task import Arrays, Evaluation, TrainConfig, TrainResult, WorkAbandoned
from workers.terms import add_penalty, correct, origin, pull_back
from workers.torch_task import batches

if TYPE_CHECKING:
    from workers.hf.definition import HfTask

EVALUATED_ROWS = 16  # examples in one pass that keeps no activations
LARGEST_EXPONENT = 700.0  # of which the exponential is finite


@dataclass(slots=True)
class Shared:
    """The models of a definition, and of what was made of it by changing something; each is loaded when it is first
    needed."""

    lock: RLock = field(default_factory=RLock)
    found: list[tuple[Base, Model]] = field(default_factory=list)

    def get(self, base: Base) -> Model:
        with self.lock:
            for known, model in self.found:
                if known == base:
                    return model
            self.found.append((base, load(base)))
            return self.found[-1][1]


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
        with self._loaded(arrays, chosen), seeded(config.seed, self.model.device):
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
            outputs = [self._outputs(self._batch(rows, part)).cpu() for part in _parts(len(rows))]
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
        with self.model.lock:
            self.model.load(arrays)
            self.model.module.eval()
            with self.running(chosen):
                yield

    @contextmanager
    def running(self, chosen: Chosen | None) -> Iterator[None]:
        """The passes inside are as `checkpointing` and `precision` say."""
        module: Any = self.model.module
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
        return torch.autocast(self.model.device.type, torch.bfloat16) if is_mixed else nullcontext()

    def _descend(self, chosen: Chosen, config: TrainConfig) -> TrainResult:
        plain, tuning, model = chosen.recipe, chosen.tuning, self.model
        scales = plain.scales(config.round, self.num_examples)
        start = origin(model, config) if plain.mu else {}  # before it goes on from where it was
        correction = {
            name: moved(torch.from_numpy(array), model.device) for name, array in config.correction.items()
        }
        descent, save = self._begun(chosen, config)
        steps, losses, loss = descent.steps, descent.losses, self._loss(chosen)
        began = config.clock() - descent.spent_s
        for batch in islice(batches(self.num_examples, plain, config.seed, self._labels), len(losses), None):
            if config.should_stop():
                raise WorkAbandoned(f"task {self.name!r}: told to stop after {len(losses)} steps")
            losses.append(self._backward(batch, chosen, loss))
            pull_back(model, plain.mu, start)
            correct(model, correction)
            if tuning.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters.values(), tuning.clip)
            steps.step(model, scales[min(len(losses), len(scales)) - 1])
            spent_s = config.clock() - began
            if plain.max_seconds and spent_s >= plain.max_seconds:
                break
            save(spent_s)
        taken = [scales[min(step, len(scales) - 1)] for step in range(len(losses))]
        return replace(self._trained(losses, taken, chosen), state=steps.state())

    def _begun(self, chosen: Chosen, config: TrainConfig) -> tuple[Descent, Callable[[float], None]]:
        """Where descent begins, or goes on; and what is to be called after every step with the seconds so far."""
        model = self.model
        steps = optimiser(chosen.recipe, model, config.state)
        descent = Descent(Moved(model.views, model.load), steps, device=model.device)

        def of() -> NDArray[np.uint8]:
            words = f"{self.name} {sorted(model.marks)} {chosen} {model.device.type} {self.definition.processes}"
            return digest_of(words, self.rows.to_arrays())

        return descent, descent.begin(chosen.recipe.save_seconds, of, config)

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
            buffers=self.model.marks,
        )

    def _gradient(self, chosen: Chosen) -> TrainResult:
        """The mean gradient over all local examples, with the penalty's; what dropout leaves out is drawn."""
        self.model.module.train()
        loss, _ = self._backward(torch.arange(self.num_examples), chosen, self._loss(chosen))
        gradients = {name: np.zeros_like(array) for name, array in self.model.initial.items()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.cpu().numpy().copy()
        return TrainResult(gradients, self.num_examples, {"loss": loss})

    def _backward(self, batch: Tensor, chosen: Chosen, loss: Loss) -> tuple[float, int]:
        """Leaves the gradient of the mean loss over these examples in the model; returns that loss, and how many
        examples or tokens it is the mean of. Raises TaskError if it is not finite."""
        self.model.module.zero_grad()
        whole = self._weight(self.rows, batch)
        if self.model.crew is None:
            total = self.accumulate(self.rows, batch, chosen, loss, whole)
        else:
            total = self._together(self.model.crew, batch, chosen, loss, whole)
        if not math.isfinite(total):
            raise self._diverged(total, chosen)
        add_penalty(self.model, chosen.recipe.l2)
        return total, whole

    def accumulate(self, examples: Examples, rows: Tensor, chosen: Chosen, loss: Loss, whole: int) -> float:
        """Adds the part of these rows in the gradient of a batch of weight `whole`; returns that of the loss."""
        shares = []
        for part in torch.split(rows, chosen.tuning.micro_batch or len(rows)) if len(rows) else ():
            batch = self._batch(examples, part)
            mean = loss(self._outputs(batch), self._targets(examples, part, batch))
            share = mean * (self._weight(examples, part) / whole)
            share.backward()  # type: ignore[no-untyped-call]
            shares.append(share.detach())
        return math.fsum(share.item() for share in shares)  # a device is waited for once

    def _together(self, crew: Crew, batch: Tensor, chosen: Chosen, loss: Loss, whole: int) -> float:
        """As `accumulate`, with helpers. Those draw by a seed of the step's own, so they need not be saved."""
        mine, *others = torch.tensor_split(batch, crew.size)
        parameters = list(self.model.parameters.values())
        weights = self._class_weights(chosen.recipe)
        beside = {} if weights is None else {"weights": weights.numpy()}
        settings = asdict(chosen.recipe) | asdict(chosen.tuning)
        seed = int(torch.randint(1 << 31, ()))
        work = [
            Work({"settings": settings, "whole": whole, "seed": seed + rank}, self.rows.taken(rows) | beside)
            for rank, rows in enumerate(others, 1)
        ]
        with crew.at_work(work, parameters) as lines:
            return lines.add_up(parameters, self.accumulate(self.rows, mine, chosen, loss, whole))

    def _batch(self, examples: Examples, rows: Tensor) -> dict[str, Tensor]:
        batch = examples.batch(rows, self.model.tokenizer.pad_token_id or 0)
        return {name: moved(values, self.model.device) for name, values in batch.items()}

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
        if self.definition.kind == "classifier":
            return moved(examples.targets[rows], self.model.device)
        return batch[LABELS][:, 1:].flatten()

    def _weight(self, examples: Examples, rows: Tensor) -> int:
        return len(rows) if self.definition.kind == "classifier" else int(examples.targets[rows].sum())

    @property
    def _labels(self) -> Tensor | None:
        return self.rows.targets if self.definition.kind == "classifier" else None

    def _loss(self, chosen: Chosen) -> Loss:
        return loss_of(chosen.recipe, self._class_weights(chosen.recipe))

    def _class_weights(self, plain: Recipe) -> Tensor | None:
        form = plain.class_weights
        return torch.from_numpy(class_weights(self.rows.targets.numpy(), form)) if form else None

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
                    found = tally(targets.cpu().numpy(), outputs.argmax(dim=1).cpu().numpy(), outputs.shape[1])
                    mistakes = found if mistakes is None else mistakes + found
        total = sum(weight for _, weight in losses)
        return math.fsum(loss * weight for loss, weight in losses) / total, mistakes

    def _diverged(self, loss: float, chosen: Chosen | None = None) -> TaskError:
        rate = f" with train.lr = {chosen.recipe.lr:g}" if chosen else ""
        return TaskError(f"task {self.name!r}: the loss is {loss}{rate}: lower train.lr, or set train.clip = 1")


def loss_of(plain: Recipe, weights: Tensor | None) -> Loss:
    """The mean loss of a batch; `weights` are those of its classes."""
    if weights is None and not plain.focal_gamma:
        return _cross_entropy
    return weighted_cross_entropy(weights, plain.focal_gamma)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=IGNORED)


def _parts(examples: int) -> Sequence[Tensor]:
    return torch.split(torch.arange(examples), EVALUATED_ROWS) if examples else ()
