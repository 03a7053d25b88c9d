"""Aggregator and workers as real processes over RabbitMQ: what they promise when nothing is killed but a worker."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

from aggregator.settings import RunSettings
from benchmarks import cut_upload, large_model
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.payloads import WINDOW
from broker.topology import Topology
from fluffle import Result, simulate
from fluffle.chaos.node import PROGRAMS, Node
from fluffle.chaos.processes import ROOT, Deployment, Process
from fluffle.chaos.task import Gate, Pace, make
from fluffle.participate import CrowdStatus
from tests.federation import Federation, names, settings
from tests.processes import Containing, deployment
from tests.rabbit_node import Rabbit
from workers.status import WorkerStatus
from workers.upload import NOTE_CHUNKS

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(300)]

WAITS = {"patience_s": 20.0}


@pytest.fixture
def federation(rabbit: Rabbit, tmp_path: Path) -> Iterator[Deployment]:
    with deployment(rabbit, tmp_path) as federation:
        yield federation


def embedded(directory: Path) -> Federation:
    return Federation(MemoryBroker(Topology("default").access), directory, names(1))


def sha256(record: HeadRecord) -> str:
    assert record.model
    return record.model.sha256


# -- a shipped learning task, which the workers know from the run alone -----------------------------------------

PARTITION, DIGITS_ROUNDS = "dirichlet:0.5", 3
DIGITS = settings(5, DIGITS_ROUNDS, run_id="digits", evaluation={"mode": "central"}, broker=WAITS).model_copy(
    update={"learning_task": "digits", "data": {"partition": PARTITION}}
)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return simulate(
        "digits",
        {
            "round.participants": 5, "data.partition": PARTITION, "stop.rounds": DIGITS_ROUNDS,
            "run.dir": str(tmp_path_factory.mktemp("simulated") / "run"),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def crew(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Five workers that serve run after run, until the last of these tests tells them to stop."""
    with deployment(rabbit, tmp_path_factory.mktemp("digits")) as federation:
        federation.set_up()
        federation.workers(*names(5), task="")
        yield federation


def test_the_model_is_that_of_a_simulation(crew: Deployment, simulated: Result) -> None:
    result = crew.aggregator(DIGITS).result()
    assert result["model_sha256"] == simulated.summary["model_sha256"]
    assert result["metrics"] == simulated.summary["metrics"]
    assert set(crew.counted(DIGITS).values()) == {1}


def test_an_aggregator_without_torch_ends_with_the_same_model(crew: Deployment, simulated: Result) -> None:
    run = DIGITS.model_copy(update={"run_id": "no-torch"})
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"mode": "federated"})})
    assert crew.run("initial", "digits", "initial.safetensors").exit_code() == 0
    bare = crew.directory / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text("import sys\nsys.modules.update(torch=None, sklearn=None)\n")
    without = {"PYTHONPATH": f"{bare}:{ROOT}"}
    needs = crew.aggregator(run, name="needs torch", **without)
    assert needs.exit_code() == 2
    assert "torch is not installed here" in needs.said
    given = ("--set", "run.initial=initial.safetensors")
    result = crew.aggregator(run, *given, name="without torch", **without).result()
    assert result["model_sha256"] == simulated.summary["model_sha256"]
    assert result["metrics"]["accuracy"] > 0.5


def test_workers_that_are_told_to_stop_leave_in_good_order(crew: Deployment) -> None:
    workers = [crew.processes[name] for name in names(5)]
    for worker in workers:
        worker.terminate()
    assert [worker.exit_code() for worker in workers] == [0] * 5
    assert all(worker.all("worker_stopped") for worker in workers)


# -- workers that come late, or come back -----------------------------------------------------------------------


def messages_in(node: Node, queue: str) -> int:
    command = [str(PROGRAMS / "rabbitmqctl"), "list_queues", "--formatter", "json", "name", "messages"]
    told = subprocess.run(command, env=node.environment, cwd=node.directory, check=True, capture_output=True)
    return {row["name"]: int(row["messages"]) for row in json.loads(told.stdout)}[queue]


def our_node(rabbit: Rabbit) -> Node:
    if rabbit.node is None:
        pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours")
    return rabbit.node


def test_a_worker_that_was_off_for_ten_rounds_takes_part_in_the_current_one(
    rabbit: Rabbit, federation: Deployment
) -> None:
    rounds = {"quorum": 2, "deadline_s": 2.0, "deadline_growth": 1.0}
    run = settings(3, rounds=14, round=rounds, broker={"liveness_s": 2.0, **WAITS})
    early, late = Gate(federation.directory / "early"), Gate(federation.directory / "late")
    beats = ("--set", "broker.heartbeat_s=0.3")
    federation.set_up()
    leader = federation.aggregator(run)
    federation.worker("p01", *beats, pace=early.pace(2))
    federation.worker("p02", *beats, pace=late.pace(13))
    worker = federation.worker("p03", *beats)
    worker.wait_for("update_sent", task=2)
    worker.kill()
    early.open()
    leader.wait_for("round_closed", round=12)
    kept_for_it = messages_in(our_node(rabbit), federation.topology.inbox("p03"))
    assert kept_for_it <= 1
    worker.start()
    worker.wait_for("update_settled", task=13, fate="counted")
    late.open()
    assert leader.result()["rounds"] == 14
    assert [begun.fields["round"] for begun in worker.all("work_begun")] == [13, 14]


def test_a_worker_waits_for_the_broker_and_for_the_federation_and_says_so(
    rabbit: Rabbit, federation: Deployment
) -> None:
    node = our_node(rabbit)
    node.kill()
    try:
        early = federation.worker("p01")
        early.wait_for("not_connected", reason=Containing("is RabbitMQ running there"))
    finally:
        node.start()
    later = federation.worker("p02")
    later.wait_for("not_connected", reason=Containing("is not set up yet"))
    leader = federation.aggregator(settings(2, rounds=2, broker=WAITS))
    assert leader.result()["updates"]["accepted"] == 4
    assert early.all("connected")
    assert later.all("connected")


# -- deadlines and quorum: as on the embedded broker ------------------------------------------------------------

DEADLINE_S = 1.5


@dataclass(frozen=True)
class Outcome:
    """What rounds came to, whoever was quicker within them."""

    rounds: list[tuple[int, int]]  # accepted and late
    fates: list[tuple[str, int, str, int, int]]
    sha256: str


def fates(decisions: list[Decision]) -> list[tuple[str, int, str, int, int]]:
    return sorted((d.participant, d.task, d.verdict, d.weight, d.staleness) for d in decisions)


async def on_the_embedded_broker(run: RunSettings, paces: dict[str, Pace], directory: Path) -> Outcome:
    federation = embedded(directory)
    federation.tasks |= {name: make(name, pace.as_data) for name, pace in paces.items()}
    async with federation.crowd() as crowd:
        aggregator = asyncio.create_task(federation.aggregator(run).run())
        crowd.start(*names(5))
        await federation.closed(1)
        await crowd.vanish("p05")
        record = await aggregator
    rounds = [(report.accepted, report.late) for report in federation.reports]
    return Outcome(rounds, fates(await federation.ledger()), sha256(record))


def as_processes(run: RunSettings, paces: dict[str, Pace], federation: Deployment) -> Outcome:
    federation.set_up()
    workers = [federation.worker(name, pace=paces.get(name)) for name in names(5)]
    for worker in workers:
        worker.wait_for("connected")
    leader = federation.aggregator(run)
    leader.wait_for("round_closed", round=1)
    federation.processes["p05"].kill()
    result = leader.result()
    rounds = [(row["accepted"], row["late"]) for row in result["history"]]
    return Outcome(rounds, fates(federation.decisions(run)), result["model_sha256"])


@pytest.mark.parametrize("late", ["discard", pytest.param("fold", marks=pytest.mark.slow)])
def test_a_deadline_with_quorum_does_what_it_does_on_the_embedded_broker(
    federation: Deployment, tmp_path: Path, late: str
) -> None:
    """p01 needs one and a quarter of the deadline, so it answers in the round after; p05 vanishes in the second."""
    run = settings(5, rounds=4, round={"quorum": 3, "deadline_s": DEADLINE_S, "late": late}, broker=WAITS)
    with ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        gate = Gate(tmp_path / "gate")
        stack.callback(gate.open)
        paces = {"p01": Pace(seconds=1.25 * DEADLINE_S), "p05": gate.pace(2)}
        beside = thread.submit(asyncio.run, on_the_embedded_broker(run, paces, tmp_path / "embedded"))
        outcome = as_processes(run, paces, federation)
        gate.open()
        assert outcome == beside.result()
    assert outcome.rounds == [(4, 0), (3, 1), (3, 1), (3, 1)]
    assert {fate[2] for fate in outcome.fates if fate[0] == "p01"} == {"late"}


# -- a large model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_large_model_goes_round_within_the_bound_of_memory_and_with_the_bits_of_its_sums() -> None:
    """The benchmark, with a model of a tenth of the largest. `measure` compares the digest."""
    lines = large_model.measure(mb=400, rounds=2)["lines"]
    assert isinstance(lines, list)
    bounds = {line["what"].partition(",")[0]: line["met"] for line in lines if line["unit"] == "MB" and line["aim"]}
    assert bounds == {"aggregator above idle": True, "a worker beyond its training": True}


# -- an upload that is cut --------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 20


def test_a_killed_worker_goes_on_with_its_upload(federation: Deployment) -> None:
    """The link is cut twice, then the worker dies: it has the update and how far it came from its journal."""
    report = cut_upload.measure(cut_upload.Plan(mb=40, cuts=2, kills=1), federation)
    again_bytes = (3 * WINDOW + NOTE_CHUNKS) * CHUNK_BYTES
    assert report["bytes_sent"] <= 1.01 * report["payload_bytes"] + again_bytes
    assert len(report["resumed_at_chunk"]) == 3
    assert report["resumed_at_chunk"] == sorted(report["resumed_at_chunk"])


@pytest.mark.slow
def test_200_mb_cut_five_times_cost_at_most_1_15_times_their_bytes(federation: Deployment) -> None:
    report = cut_upload.measure(cut_upload.Plan(), federation)
    assert report["payload_bytes"] > 200_000_000
    assert report["connections"] >= 2 * (1 + 5)
    assert 1 < report["ratio"] <= 1.15


def appears(path: Path) -> None:
    """A checkpoint of a model that the record carries comes a moment after it."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


# -- misuse, in words -------------------------------------------------------------------------------------------


def refuses(process: Process, code: int, *words: str) -> None:
    """It ends by itself, with one line that names the thing and the remedy, and without a traceback."""
    assert process.exit_code() == code
    assert "Traceback" not in process.said
    lines = [line for line in process.said.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, process.said
    line = lines[0]
    assert line.startswith("fluffle: error: ")
    for word in words:
        assert word in line


def test_a_worker_without_a_name_is_refused(federation: Deployment) -> None:
    refuses(federation.worker(""), 2, "no participant is named", "--participant NAME")


def test_a_worker_with_a_reserved_name_is_refused(federation: Deployment) -> None:
    refuses(federation.worker("aggregator"), 2, "'aggregator' is not a valid name", "none of aggregator, all")


def test_an_aggregator_without_a_broker_is_refused(federation: Deployment) -> None:
    refuses(federation.aggregator(settings(1), "--broker", ""), 2, "broker.url", "amqp://")
    refuses(federation.aggregator(settings(1), "--broker", "memory"), 2, "that others can reach", "--broker")


def test_a_second_worker_on_the_same_journal_is_refused(federation: Deployment) -> None:
    federation.worker("p01", "--journal", "shared").wait_for("worker_started")
    refuses(federation.worker("p02", "--journal", "shared"), 1, "shared", "another worker", "--journal")


def test_a_wrong_password_is_told_in_words(federation: Deployment) -> None:
    wrong = federation.directory / "wrong.toml"
    wrong.write_text('p01 = "guessed"\naggregator = "guessed"\n')
    wrong.chmod(0o600)
    refuses(federation.worker("p01", "--secrets", str(wrong)), 1, "refused user or password")
    refuses(federation.aggregator(settings(1), "--secrets", str(wrong)), 1, "refused user or password")


def test_another_runs_place_is_taken_only_with_abandon(federation: Deployment) -> None:
    first, second = (settings(1, rounds=2, run_id=name, broker=WAITS) for name in ("first", "second"))
    begun = federation.aggregator(first, name="first")
    begun.wait_for("caught_up")
    begun.kill()
    refuses(federation.aggregator(second), 2, "is in run 'first'", "--abandon first")
    federation.worker("p01")
    assert federation.aggregator(second, "--abandon", "first").result()["rounds"] == 2


def test_a_run_that_the_broker_lost_goes_on_from_its_checkpoints_or_begins_again(
    rabbit: Rabbit, federation: Deployment, tmp_path: Path
) -> None:
    """Another federation is as good as a broker that lost everything: there is no record of the run."""
    run = settings(1, rounds=4, broker=WAITS)
    undisturbed = sha256(asyncio.run(embedded(tmp_path / "embedded").run(run)))
    gate = Gate(tmp_path / "gate")
    leader = federation.aggregator(run)
    federation.worker("p01", pace=gate.pace(3)).wait_for("work_begun", round=3)
    appears(leader.run_dir / "checkpoints" / "v000002.json")
    leader.kill()
    gate.open()
    with deployment(rabbit, tmp_path) as after:
        refuses(after.aggregator(run), 1, "checkpoints up to version 2", "--from-checkpoint", "--fresh")
        worker = after.worker("p01")
        assert after.aggregator(run, "--from-checkpoint").result()["model_sha256"] == undisturbed
        assert [begun.fields["round"] for begun in worker.all("work_begun")] == [3, 4]
    with deployment(rabbit, tmp_path) as after:
        worker = after.worker("p01")
        assert after.aggregator(run, "--fresh").result()["model_sha256"] == undisturbed
        assert [begun.fields["round"] for begun in worker.all("work_begun")] == [1, 2, 3, 4]


def test_a_task_that_is_not_shipped_needs_workers_that_name_it(federation: Deployment) -> None:
    leader = federation.aggregator(settings(2, broker=WAITS))
    federation.workers("p01", "p02", task="")
    leader.wait_for("training_failed", error=Containing("which is not shipped: start the worker with --task"))
    refuses(leader, 1, "everybody failed in round 1", "which is not shipped")


def test_a_worker_tells_over_http_what_it_does(federation: Deployment) -> None:
    federation.set_up()
    worker = federation.worker("p01", "--http", "127.0.0.1:0")
    url = f"http://127.0.0.1:{worker.wait_for('http_listening').fields['port']}"
    worker.wait_for("connected")
    with urlopen(f"{url}/readyz", timeout=10) as ready:
        assert ready.status == 200
    with urlopen(f"{url}/status", timeout=10) as status:
        told = WorkerStatus.model_validate_json(status.read())
    assert (told.participant, told.connected, told.phase) == ("p01", True, "idle")
    assert worker.stop() == 0


def test_one_process_serves_several_participants(federation: Deployment) -> None:
    run = settings(4, rounds=3, broker=WAITS)
    federation.set_up()
    several = federation.worker("p01..p03", "--once", "--http", "127.0.0.1:0")
    url = f"http://127.0.0.1:{several.wait_for('http_listening').fields['port']}"
    federation.worker("p04", "--once")
    leader = federation.aggregator(run)
    several.wait_for("update_sent", participant="p03")
    with urlopen(f"{url}/status", timeout=10) as status:
        told = CrowdStatus.model_validate_json(status.read())
    assert [one.participant for one in told.workers] == ["p01", "p02", "p03"]
    assert leader.result()["updates"]["accepted"] == 12
    assert several.exit_code() == 0
    assert set(federation.counted(run).values()) == {1}
    journals = federation.directory / "journals" / federation.topology.federation
    assert sorted(path.name for path in journals.iterdir()) == ["p01", "p02", "p03", "p04"]
