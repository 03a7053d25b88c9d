"""Operators control a run over RabbitMQ, with the commands that they type."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.errors import AccessRefused
from broker.messages import Control
from broker.topology import AGGREGATOR, Topology
from broker.wire import encode
from fluffle.cli import cli
from tests.federation import Federation, names, settings
from tests.rabbit_node import Rabbit, password

pytestmark = [pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(120)]


async def typed(rabbit: Rabbit, topology: Topology, *command: str) -> str:
    """What that command prints to the operator."""
    url = rabbit.url.with_user(AGGREGATOR).with_password(password(AGGREGATOR))
    where = ("--broker", str(url), "--federation", topology.federation)
    result = await asyncio.to_thread(CliRunner().invoke, cli, [*command, *where])
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_pause_resume_remove_admit_and_stop(rabbit: Rabbit, tmp_path: Path) -> None:
    topology = rabbit.topology()
    federation = Federation(rabbit.broker(), tmp_path, names(3), topology=topology, heartbeat_s=0.2)
    run = settings(3, rounds=99, broker={"patience_s": 20.0})
    aggregator = federation.aggregator(run)
    async with asyncio.timeout(100), federation.crowd() as crowd:
        running = asyncio.create_task(aggregator.run())
        crowd.start(*names(3), lag_s=0.2)
        await federation.closed(1)
        assert (await typed(rabbit, topology, "pause")).startswith("paused: ")
        closed = len(federation.reports)
        await asyncio.sleep(2.0)
        assert len(federation.reports) <= closed + 1
        assert (await typed(rabbit, topology, "pause")).startswith("already paused")
        assert (await typed(rabbit, topology, "participants", "remove", "p03")).startswith("removed p03")
        closed = len(federation.reports)
        await typed(rabbit, topology, "resume")
        await federation.closed(closed + 3)
        assert {report.cohort for report in federation.reports[closed:]} == {2}
        assert (await typed(rabbit, topology, "participants", "admit", "p03")).startswith("admitted p03")
        while federation.reports[-1].accepted < 3:  # its worker connected again when its inbox was deleted
            await federation.closed(len(federation.reports) + 1)
        await typed(rabbit, topology, "stop")
        head = await running
    assert head.finished == "stopped by the operator"
    refused = [d.reason for d in await federation.ledger() if d.verdict == "refused"]
    assert set(refused) == {"p03 was removed by the operator"}


async def test_a_participant_may_not_write_into_the_log(rabbit: Rabbit, tmp_path: Path) -> None:
    topology, broker = rabbit.topology(), rabbit.broker()
    aggregator = await broker.connect(AGGREGATOR, purpose="test")
    await aggregator.declare(*topology.aggregator_declarations())
    participant = await broker.connect("p01", purpose="test")
    with pytest.raises(AccessRefused):
        await participant.publish("", topology.updates, encode(Control(command="stop", nonce="n1")))
    with pytest.raises(AccessRefused):
        await participant.declare(*topology.operator_declarations("n1"))
    await participant.close()
    await aggregator.close()
