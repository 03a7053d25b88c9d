"""Participants of one process that a round asks for the same train together, in groups (`stacked.py`).

Nobody waits for anybody: the first of a group whose order comes trains all of it, the others find what theirs came
to. Who is in which group follows from the order alone and not from who is quick, so equal seeds give equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from broker.errors import TaskError
from broker.messages import TrainRound
from workers.recipe import SGD, Recipe
from workers.stacked import Fit, Member, Unstackable, Work, train_side_by_side, try_out
from workers.task import Arrays, Evaluation, LearningTask, TrainConfig, TrainResult, WorkAbandoned, train_seed
from workers.torch_task import TorchTask

GROUP_BYTES = 64 << 20  # most that a step of a group holds: parameters, gradients, velocity, what backward needs
FEWEST = 4  # with fewer models, or larger ones, one after the other is as quick

log = structlog.get_logger(__name__)


class Together:
    """The learning tasks of the participants of one process, which do one piece of work at a time.

    At most one trained model of each waits until its worker asks for it, and none for longer than its round.
    """

    def __init__(self, tasks: Mapping[str, TorchTask], chosen: Recipe, asked: int) -> None:
        """`asked`: how many a round asks. Raises Unstackable if they cannot train together, or gain nothing."""
        if any(type(task).train is not TorchTask.train for task in tasks.values()):
            raise Unstackable("the task has a way of its own to train")
        if any(task.device.type != "cpu" for task in tasks.values()):
            raise Unstackable("the task trains on another device than the CPU")
        if chosen.mu or chosen.max_seconds or chosen.optimiser != SGD or chosen.is_scheduled:
            names = "train.mu, train.max_seconds, train.optimiser and a schedule"
            raise Unstackable(f"{names} are for each participant alone")
        self._tasks = tasks
        self._fit: Fit = try_out(max(tasks.values(), key=lambda task: task.num_examples), chosen)
        self.largest_group = GROUP_BYTES // self._fit.step_bytes
        if asked < FEWEST:
            raise Unstackable(f"a round asks {asked} participants, and fewer than {FEWEST} gain nothing")
        if self.largest_group < FEWEST:
            raise Unstackable(
                f"a step of one model takes {self._fit.step_bytes} bytes: {FEWEST} do not fit into {GROUP_BYTES}, "
                "and models so large gain nothing"
            )
        self._task: tuple[str, int] = ("", 0)  # run and number of what the outcomes are of
        self._outcomes: dict[str, TrainResult | TaskError | None] = {}  # None: is to be trained alone

    def task_for(self, participant: str, told: TrainRound) -> LearningTask:
        """What a worker trains with when it is told that."""
        return OneOfMany(self, self._tasks[participant], participant, told)

    def train(self, participant: str, told: TrainRound, arrays: Arrays, config: TrainConfig) -> TrainResult:
        """As the participant's own task would. Raises what that would."""
        own = self._tasks[participant]
        if not own.descends(config) or not self._is_newest(told):
            return own.train(arrays, config)
        if config.should_stop():
            raise WorkAbandoned(f"task {own.name!r}: told to stop before the first step")
        if participant not in self._outcomes:
            work = Work(arrays, own.definition.recipe(config.settings), config.should_stop)
            self._outcomes.update(self._train_all(self._group_of(participant, told), told, work))
        outcome = self._outcomes.pop(participant)
        if isinstance(outcome, TaskError):
            raise outcome
        return outcome or own.train(arrays, config)

    def _is_newest(self, told: TrainRound) -> bool:
        """Whether nobody was told of a later task. What is left of earlier ones is forgotten."""
        run_id, number = self._task
        if (told.run_id, told.task) != self._task:
            if told.run_id == run_id and told.task < number:
                return False
            self._task, self._outcomes = (told.run_id, told.task), {}
        return True

    def _group_of(self, participant: str, told: TrainRound) -> list[str]:
        """Those whom the order asks, the most examples first, in pieces of about the same length: the piece that
        holds this one. So few rows are padding, and those who take most steps come first."""
        asked = sorted(
            (name for name in told.asked if name in self._tasks),
            key=lambda name: (-self._tasks[name].num_examples, name),
        )
        pieces = -(-len(asked) // self.largest_group)
        piece = asked.index(participant) * pieces // len(asked)
        first, end = (-(-number * len(asked) // pieces) for number in (piece, piece + 1))
        return asked[first:end]

    def _train_all(
        self, group: list[str], told: TrainRound, work: Work
    ) -> dict[str, TrainResult | TaskError | None]:
        if len(group) == 1:
            return dict.fromkeys(group)
        members = [Member(self._tasks[name], train_seed(told.seed, name, told.round)) for name in group]
        try:
            return dict(zip(group, train_side_by_side(self._fit, members, work), strict=True))
        except WorkAbandoned:
            raise
        except Exception as error:  # alone, each says what is wrong with its own data or model
            why = f"{type(error).__name__}: {error}"
            log.warning("group_trained_one_by_one", round=told.round, participants=len(group), why=why)
            return dict.fromkeys(group)


class OneOfMany:
    """The learning task of one participant, for one order."""

    def __init__(self, together: Together, own: TorchTask, participant: str, told: TrainRound) -> None:
        self.name, self.num_examples = own.name, own.num_examples
        self._together, self._own, self._participant, self._told = together, own, participant, told

    def initial(self) -> Arrays:
        return self._own.initial()

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return self._together.train(self._participant, self._told, arrays, config)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return self._own.evaluate(arrays)
