"""Many participants' models trained side by side: their parameters are stacked, and one pass (`torch.func.vmap`)
does a step of all.

The same steps as `TorchTask.train` takes for each of them, on the same batches in the same order. Only sums of
floating-point numbers are added up in another order, so what comes out is equal within rounding and not bit for
bit. `try_out` finds out first, on the model itself, whether that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap

from broker.errors import TaskError
from workers.lesson import Loss
from workers.modules import load_arrays, seeded
from workers.recipe import Recipe
from workers.task import Arrays, TrainResult, WorkAbandoned
from workers.torch_task import Rows, TaskDefinition, TorchTask, batches

TOLERANCE = 1e-4  # of the largest gradient; rounding in float32 is about a hundredth of that

EACH: Mapping[str, Loss] = {
    "cross-entropy": partial(F.cross_entropy, reduction="none"),
    "mse": lambda outputs, targets: F.mse_loss(outputs.reshape(targets.shape), targets, reduction="none"),
}

Gradients = dict[str, Tensor]


class Unstackable(TaskError):
    """Participants cannot train side by side, or gain nothing from it; it says why."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What `try_out` learned: which parameters training moves, and how many bytes a step of one model holds."""

    moved: tuple[str, ...]
    step_bytes: int


@dataclass(frozen=True, slots=True)
class Member:
    """One participant's data, and the seed of its work in this round."""

    task: TorchTask
    seed: int


@dataclass(frozen=True, slots=True)
class Work:
    """What all members do: the arrays that they start from (read-only), how they train, and when to give up."""

    arrays: Arrays
    chosen: Recipe
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's examples: `x` and `y` (members, rows, ...), `share` (members, rows).

    A batch with fewer rows repeats its first example. The `share` of a repeated one in its member's mean loss is 0,
    of the others 1 / n.
    """

    x: Tensor
    y: Tensor
    share: Tensor


def side_by_side(rows: Sequence[Rows], indices: Sequence[Tensor], width: int) -> Batch:
    """Each member's examples of these indices, padded to `width` rows."""
    padded = [torch.cat([chosen, chosen[:1].expand(width - len(chosen))]) for chosen in indices]
    counts = torch.tensor([[len(chosen)] for chosen in indices])
    return Batch(
        torch.stack([own.x[chosen] for own, chosen in zip(rows, padded, strict=True)]),
        torch.stack([own.y[chosen] for own, chosen in zip(rows, padded, strict=True)]),
        (torch.arange(width) < counts) / counts,
    )


class Models:
    """Copies of the task's model as it is now, one for each member."""

    def __init__(self, task: TorchTask, moved: Sequence[str], members: int, chosen: Recipe) -> None:
        own = dict(task.module.named_parameters())
        self.parameters = {name: own[name].detach().expand(members, *own[name].shape).clone() for name in moved}
        moving = self.parameters if chosen.momentum else {}
        self._velocity = {name: torch.zeros_like(values) for name, values in moving.items()}
        self._chosen = chosen
        self._outputs = vmap(partial(functional_call, task.module))
        self._loss_of_each = _loss_of_each(task.definition)

    def gradients(self, batch: Batch) -> tuple[Gradients, Tensor]:
        """Of the first members' mean losses, one for each in the batch; and those losses (members,).

        No member's loss depends on another's parameters, so the gradient of their sum is that of each.
        """
        first = {name: values[: len(batch.x)].requires_grad_() for name, values in self.parameters.items()}
        outputs = self._outputs(first, (batch.x,)).flatten(0, 1)
        each = self._loss_of_each(outputs, batch.y.flatten(0, 1)).reshape(*batch.share.shape, -1).mean(dim=2)
        losses = (each * batch.share).sum(dim=1)
        found = torch.autograd.grad(losses.sum(), list(first.values()))
        return dict(zip(first, found, strict=True)), losses.detach()

    def step(self, batch: Batch) -> list[float]:
        """v <- momentum v + g; w <- w - lr v, for the first members; returns their mean losses before it."""
        gradients, losses = self.gradients(batch)
        for name, values in self.parameters.items():
            first, step = values[: len(batch.x)], gradients[name]
            if self._chosen.l2 and values.ndim > 2:  # weights, not biases: the first dimension is the members'
                step = step.add(first, alpha=self._chosen.l2)
            if self._chosen.momentum:
                step = self._velocity[name][: len(batch.x)].mul_(self._chosen.momentum).add_(step)
            first.sub_(step, alpha=self._chosen.lr)
        return list(losses.tolist())


def train_side_by_side(fit: Fit, members: Sequence[Member], work: Work) -> list[TrainResult | TaskError]:
    """What each member's training comes to, or what it raises. Members come sorted, the most examples first.

    Raises WorkAbandoned when told to stop, and whatever the model raises for any of them.
    """
    task = members[0].task
    load_arrays(task.module, work.arrays)
    task.module.train()
    models = Models(task, fit.moved, len(members), work.chosen)
    losses: list[list[tuple[float, int]]] = [[] for _ in members]
    rows = [member.task.rows for member in members]
    for indices in _steps(members, work.chosen):
        if work.should_stop():
            raise WorkAbandoned(f"task {task.name!r}: told to stop after {len(losses[0])} steps")
        batch = side_by_side(rows[: len(indices)], indices, max(map(len, indices)))
        for index, loss in enumerate(models.step(batch)):
            losses[index].append((loss, len(indices[index])))
    arrays = _arrays_of_each(task.module, models, work.arrays)
    return [_outcome(*each, work.chosen) for each in zip(members, arrays, losses, strict=True)]


def try_out(task: TorchTask, chosen: Recipe) -> Fit:
    """One step's gradients of the initial model, alone and side by side, in a batch that is whole and one that is
    padded. Raises Unstackable if they differ, or if it cannot be done."""
    if chosen.remedies:
        raise Unstackable(f"{', '.join(f'train.{name}' for name in chosen.remedies)} is for each participant alone")
    try:
        load_arrays(task.module, task.initial())
        task.module.train()
        return _compared(task, replace(chosen, l2=0.0))
    except Unstackable:
        raise
    except Exception as error:  # whatever a user's model raises: it may still be able to train alone
        raise Unstackable(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _compared(task: TorchTask, chosen: Recipe) -> Fit:
    whole = next(batches(task.num_examples, chosen, seed=0))
    pair = (whole, whole[: -(-len(whole) // 2)])
    held_bytes: list[int] = []

    def note(saved: Tensor) -> Tensor:
        held_bytes.append(saved.nbytes)
        return saved

    with seeded(0):
        with saved_tensors_hooks(note, lambda saved: saved):
            first = _gradients_alone(task, whole, chosen)
        alone = [first, _gradients_alone(task, pair[1], chosen)]
    models = Models(task, tuple(first), len(pair), chosen)
    together, _ = models.gradients(side_by_side([task.rows] * 2, pair, len(whole) + 1))
    for index, expected in enumerate(alone):
        allowed = TOLERANCE * max(gradient.abs().max().item() for gradient in expected.values())
        if not all((together[name][index] - own).abs().max().item() <= allowed for name, own in expected.items()):
            raise Unstackable(
                "its gradients are others than alone: the examples of a batch influence one another, or the loss "
                "is not their mean"
            )
    own_bytes = sum(gradient.nbytes for gradient in first.values())
    return Fit(tuple(first), 3 * own_bytes + sum(held_bytes))  # parameters, gradients, velocity


def _gradients_alone(task: TorchTask, indices: Tensor, chosen: Recipe) -> Gradients:
    before = {name: buffer.clone() for name, buffer in task.module.named_buffers()}
    task.backward(indices, chosen)
    for name, buffer in task.module.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise Unstackable(f"training changes the buffer {name!r}, as batch normalisation does")
    return {name: own.grad for name, own in task.module.named_parameters() if own.grad is not None}


def _loss_of_each(definition: TaskDefinition) -> Loss:
    """The loss of each example by itself, whose mean is the definition's."""
    if isinstance(definition.loss, str):
        return EACH[definition.loss]
    mean: Loss = definition.loss
    return vmap(lambda output, target: mean(output[None], target[None]))


def _steps(members: Sequence[Member], chosen: Recipe) -> Iterator[list[Tensor]]:
    """Each step's indices for the members that still have one: the first so many."""
    own = [batches(member.task.num_examples, chosen, member.seed) for member in members]
    for indices in zip_longest(*own):
        yield [some for some in indices if some is not None]


def _arrays_of_each(module: nn.Module, models: Models, start: Arrays) -> Iterator[Arrays]:
    """Each member's arrays; what training does not move is as it came."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tied = {name: names[id(own)] for name, own in module.named_parameters(remove_duplicate=False)}
    stacked = {name: values.numpy() for name, values in models.parameters.items()}
    for index in range(len(next(iter(stacked.values())))):
        yield {
            name: stacked[tied[name]][index] if tied.get(name) in stacked else array.copy()
            for name, array in start.items()
        }


def _outcome(
    member: Member, arrays: Arrays, losses: Sequence[tuple[float, int]], chosen: Recipe
) -> TrainResult | TaskError:
    try:
        return member.task.trained(arrays, losses, chosen)
    except TaskError as error:
        return error
