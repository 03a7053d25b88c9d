"""The shipped learning tasks. This catalogue needs no torch; a task's file is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from broker.errors import ConfigError
from workers.definition import Definition, is_definition
from workers.task import is_learning_task


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue: where the definition is, what it learns, whether that needs torch, and what must
    be got before."""

    where: str
    summary: str
    needs_torch: bool = True
    needs: str = ""


LARGE = "pip install 'fluffle[llm]', fluffle data fetch "
CATALOGUE: Mapping[str, Entry] = {
    "mnist-logreg": Entry("workers.tasks.mnist:LOGREG", "handwritten digits, softmax regression"),
    "mnist-2nn": Entry("workers.tasks.mnist:TWO_LAYERS", "handwritten digits, two hidden layers of 200"),
    "mnist-cnn": Entry("workers.tasks.mnist:CNN", "handwritten digits, two convolutions"),
    "digits": Entry("workers.tasks.digits:DIGITS", "small handwritten digits (8 x 8), one hidden layer of 128"),
    "heart": Entry("workers.tasks.heart:HEART", "heart disease in four hospitals, logistic regression"),
    "shakespeare-lstm": Entry(
        "workers.tasks.shakespeare:LSTM", "next character of a play, 423 speakers, two layers of LSTM"
    ),
    "shakespeare-transformer": Entry(
        "workers.tasks.shakespeare:TRANSFORMER", "next character of a play, 423 speakers, a small transformer"
    ),
    "diabetes": Entry("workers.tasks.diabetes:DIABETES", "disease progression after a year, linear regression"),
    "diabetes-ridge": Entry(
        "workers.tasks.estimators:DIABETES_RIDGE",
        "disease progression after a year, ridge regression from sums",
        needs_torch=False,
    ),
    "digits-bayes": Entry(
        "workers.tasks.estimators:DIGITS_BAYES",
        "small handwritten digits, multinomial naive Bayes from sums",
        needs_torch=False,
    ),
    "digits-kmeans": Entry(
        "workers.tasks.estimators:DIGITS_KMEANS",
        "small handwritten digits in ten clusters, k-means",
        needs_torch=False,
    ),
    "digits-pca": Entry(
        "workers.tasks.estimators:DIGITS_PCA",
        "small handwritten digits, ten principal components from sums",
        needs_torch=False,
    ),
    "spam-lora": Entry(
        "workers.tasks.spam:SPAM",
        "spam among mails, LoRA adapters of MiniLM (22.7 million parameters)",
        needs=f"{LARGE}minilm, fluffle data fetch spam-assassin",
    ),
    "shakespeare-lora": Entry(
        "workers.tasks.bard:BARD",
        "next word of a play, LoRA adapters of SmolLM2 (135 million parameters)",
        needs=f"{LARGE}smollm2",
    ),
}


def find_task(name: str) -> Definition:
    """A shipped task by its name, or a user's own as `package.module:OBJECT`.

    Raises ConfigError, with near names, if there is no such task or its module cannot be imported.
    """
    found = find_object(name)
    if not is_definition(found):
        raise ConfigError(
            f"task {name!r} is no TaskDefinition, EstimatorDefinition or HfTask, which this command needs, but "
            f"{found!r}"
        )
    return found


def find_object(name: str) -> Any:
    """What a task's name stands for: a definition, a LearningTask, or a function that makes one.

    Raises ConfigError as `find_task` does.
    """
    if ":" not in name and name not in CATALOGUE:
        raise ConfigError(
            f"there is no task {name!r}{_near(name, CATALOGUE)}: use one of {', '.join(CATALOGUE)}, or your own as "
            "package.module:OBJECT"
        )
    where = name if ":" in name else CATALOGUE[name].where
    module_name, _, object_name = where.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ConfigError(
            f"task {where!r}: importing {module_name!r} failed with {type(error).__name__}: {error}. "
            "Is its folder on PYTHONPATH?"
        ) from error
    found = getattr(module, object_name, None)
    if _is_task(found) or inspect.isroutine(found) or inspect.isclass(found):
        return found
    there = [key for key, value in vars(module).items() if _is_task(value)]
    raise ConfigError(
        f"task {where!r}: {module_name} has no task named {object_name!r}{_near(object_name, there)}; "
        f"it has: {', '.join(there) or 'none'}"
    )


def _is_task(found: object) -> bool:
    """Whether it is a learning task, or the definition of one."""
    return is_definition(found) or is_learning_task(found)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
