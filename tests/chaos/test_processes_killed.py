"""Aggregators, workers and RabbitMQ as processes of their own, ended with kill -9 in the middle of a round.

Whoever dies: the model has the bits of an undisturbed run on the embedded broker, and every update counts once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.memory import MemoryBroker
from broker.topology import Topology
from fluffle.chaos.processes import LEADER, Deployment, Process
from fluffle.chaos.task import Gate
from tests.federation import Federation, names, settings
from tests.processes import deployment
from tests.rabbit_node import Rabbit

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(300)]

PARTICIPANTS, ROUNDS = 3, 6
CODEC = {"up": "topk:0.05+zstd"}  # what it owes must survive, too
RUN = settings(PARTICIPANTS, ROUNDS, round={"deadline_s": 250.0}, codec=CODEC, broker={"patience_s": 20.0})
MIDDLE = 3  # the round in which something happens
TAKE_OVER_S = 20.0  # generous: on an idle machine it is well under a second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest on the embedded broker, with nothing in the way."""
    federation = Federation(
        MemoryBroker(Topology("default").access), tmp_path_factory.mktemp("quiet"), names(PARTICIPANTS)
    )
    model = asyncio.run(federation.run(RUN)).model
    assert model
    return model.sha256


@dataclass(frozen=True)
class Scene:
    """A run in the middle of its third round: p01 and p02 have answered, p03 trains until the gate opens."""

    federation: Deployment
    gate: Gate
    undisturbed: str

    @property
    def leader(self) -> Process:
        return self.federation.processes[LEADER]

    @property
    def trainer(self) -> Process:
        return self.federation.processes["p03"]

    def reach_the_middle(self) -> None:
        self.federation.set_up()
        self.federation.aggregator(RUN)
        answering = self.federation.workers("p01", "p02")
        self.federation.worker("p03", pace=self.gate.pace(MIDDLE)).wait_for("work_begun", round=MIDDLE)
        for worker in answering:
            worker.wait_for("update_sent", task=MIDDLE)

    def ends_undisturbed(self, *, led_by: str = LEADER) -> None:
        """Opens the gate, and checks what the run came to."""
        self.gate.open()
        result = self.federation.processes[led_by].result()
        assert result["rounds"] == ROUNDS
        assert result["model_sha256"] == self.undisturbed
        once = {(participant, task): 1 for participant in names(PARTICIPANTS) for task in range(1, ROUNDS + 1)}
        assert self.federation.counted(RUN) == once


@pytest.fixture
def scene(rabbit: Rabbit, tmp_path: Path, undisturbed: str) -> Iterator[Scene]:
    gate = Gate(tmp_path / "gate")
    with deployment(rabbit, tmp_path) as federation:
        scene = Scene(federation, gate, undisturbed)
        scene.reach_the_middle()
        yield scene
    gate.open()


def test_an_aggregator_that_is_killed_goes_on_when_it_is_started_again(scene: Scene) -> None:
    scene.leader.kill()
    scene.leader.start().wait_for("caught_up", round=MIDDLE - 1)
    scene.ends_undisturbed()


def test_a_worker_that_is_killed_while_it_trains_trains_again(scene: Scene) -> None:
    scene.trainer.kill()
    scene.trainer.start().wait_for("work_begun", round=MIDDLE)
    scene.ends_undisturbed()


def test_a_worker_that_is_killed_after_its_update_was_sent_does_not_train_again(scene: Scene) -> None:
    sender = scene.federation.processes["p01"]
    sender.kill()
    sender.start().wait_for("connected")
    scene.gate.open()
    sender.wait_for("update_settled", task=MIDDLE, fate="counted")
    assert sender.all("work_begun", round=MIDDLE) == []
    scene.ends_undisturbed()


def test_a_rabbitmq_that_is_killed_and_started_again_changes_nothing(rabbit: Rabbit, scene: Scene) -> None:
    """The gate opens while there is no broker: an update is finished that cannot be sent yet."""
    if rabbit.node is None:
        pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours to kill")
    rabbit.node.settle()
    rabbit.node.kill()
    scene.leader.wait_for("term_ended")
    scene.gate.open()
    scene.trainer.wait_for("work_done", task=MIDDLE)
    rabbit.node.start()
    scene.ends_undisturbed()
    assert len(scene.leader.all("leading")) > 1


# -- a standby --------------------------------------------------------------------------------------------------


@pytest.fixture
def standby(scene: Scene) -> Process:
    standby = scene.federation.aggregator(RUN, name="standby")
    standby.wait_for("standing_by")
    return standby


def test_a_standby_takes_over_from_a_leader_that_is_killed(scene: Scene, standby: Process) -> None:
    killed = scene.leader.kill()
    took_over(standby, killed, "kill -9")
    scene.ends_undisturbed(led_by="standby")


def test_a_standby_takes_over_from_a_leader_that_is_told_to_stop(scene: Scene, standby: Process) -> None:
    told = scene.leader.terminate()
    took_over(standby, told, "SIGTERM")
    assert scene.leader.exit_code() == 143
    assert "start it again and it goes on" in scene.leader.said
    scene.ends_undisturbed(led_by="standby")


def test_a_standby_whose_leader_finishes_ends_with_the_same_model(scene: Scene, standby: Process) -> None:
    scene.ends_undisturbed()
    assert standby.result()["model_sha256"] == scene.undisturbed
    assert (standby.run_dir / "model.safetensors").exists()


@pytest.mark.slow  # RabbitMQ misses a frozen leader after about two heartbeats of five seconds
def test_a_leader_that_was_frozen_until_another_led_changes_nothing(scene: Scene, standby: Process) -> None:
    frozen = scene.leader.freeze()
    took_over(standby, frozen, "SIGSTOP", within_s=90.0)
    scene.leader.thaw()
    scene.leader.wait_for("term_ended")
    scene.ends_undisturbed(led_by="standby")
    assert scene.leader.result()["model_sha256"] == scene.undisturbed


def took_over(standby: Process, since: float, after: str, within_s: float = TAKE_OVER_S) -> None:
    """Waits until the standby leads, and prints how long that took."""
    leading_s = standby.wait_for("leading", within_s=within_s).at - since
    caught_up_s = standby.wait_for("caught_up").at - since
    print(f"after {after} the standby led within {leading_s:.2f} s and had caught up within {caught_up_s:.2f} s")
    assert leading_s < within_s
