"""Fluffle: federated learning as an asynchronous message-queue pipeline over RabbitMQ.

What users import. Names are resolved when they are used, so that importing `fluffle` brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aggregator.daemon import Aggregator
    from aggregator.job import Job
    from broker.errors import FluffleError
    from broker.memory import MemoryBroker
    from broker.topology import Topology
    from fluffle.face import Result, resume, simulate
    from workers.data import Dataset
    from workers.estimators import PCA, EstimatorDefinition, GaussianBayes, KMeans, MultinomialBayes, Ridge
    from workers.journal import FileJournal, MemoryJournal
    from workers.link import WorkerSettings
    from workers.preprocess import Preprocess, Reference
    from workers.scaler import FederatedScaler
    from workers.task import Evaluation, LearningTask, TrainConfig, TrainResult, WorkAbandoned
    from workers.tasks import find_task
    from workers.torch_task import TaskDefinition
    from workers.worker import Site, Worker

__all__ = [
    "PCA",
    "Aggregator",
    "Dataset",
    "EstimatorDefinition",
    "Evaluation",
    "FederatedScaler",
    "FileJournal",
    "FluffleError",
    "GaussianBayes",
    "Job",
    "KMeans",
    "LearningTask",
    "MemoryBroker",
    "MemoryJournal",
    "MultinomialBayes",
    "Preprocess",
    "Reference",
    "Result",
    "Ridge",
    "Site",
    "TaskDefinition",
    "Topology",
    "TrainConfig",
    "TrainResult",
    "WorkAbandoned",
    "Worker",
    "WorkerSettings",
    "find_task",
    "resume",
    "simulate",
]

_HOMES = {
    "Aggregator": "aggregator.daemon",
    "Dataset": "workers.data",
    "EstimatorDefinition": "workers.estimators",
    "Evaluation": "workers.task",
    "FederatedScaler": "workers.scaler",
    "FileJournal": "workers.journal",
    "FluffleError": "broker.errors",
    "GaussianBayes": "workers.estimators",
    "Job": "aggregator.job",
    "KMeans": "workers.estimators",
    "LearningTask": "workers.task",
    "MemoryBroker": "broker.memory",
    "MemoryJournal": "workers.journal",
    "MultinomialBayes": "workers.estimators",
    "PCA": "workers.estimators",
    "Preprocess": "workers.preprocess",
    "Reference": "workers.preprocess",
    "Result": "fluffle.face",
    "Ridge": "workers.estimators",
    "Site": "workers.worker",
    "TaskDefinition": "workers.torch_task",
    "Topology": "broker.topology",
    "TrainConfig": "workers.task",
    "TrainResult": "workers.task",
    "WorkAbandoned": "workers.task",
    "Worker": "workers.worker",
    "WorkerSettings": "workers.link",
    "find_task": "workers.tasks",
    "resume": "fluffle.face",
    "simulate": "fluffle.face",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fluffle' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
