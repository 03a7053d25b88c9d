"""A soak that is much too short to say anything, but all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.soak import Plan, soak, text, written
from fluffle.chaos.node import installed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.timeout(1800)]


def test_a_short_soak_measures_everybody_and_does_not_call_them_flat(tmp_path: Path) -> None:
    if not installed():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("RabbitMQ is not installed")
    told = json.loads(written(soak(Plan(rounds=60, faults=3, phases=1), tmp_path)))
    everybody = ["leader", "p01", "p02", "p03", "p04", "rabbitmq", "standby"]
    assert told["balanced"]
    assert told["same"]
    assert told["not_flat"] == [f"{name}: no life was long enough to be judged" for name in everybody]
    assert not told["passed"]
    assert "SOMETHING WENT WRONG" in text(told)
    _, queues, files = told["waiting_and_files"][0]
    assert {sample[0] for sample in told["samples"]} <= set(range(5, 58))
    assert set().union(*(sample[3] for sample in told["samples"])) == set(everybody)
    assert {"fl.soak.head", "fl.soak.rejected", "fl.soak.updates", "fl.soak.inbox.p01"} <= set(queues)
    assert {"run of leader", "journals", "fl_soak_updates", "quorum"} <= set(files)
    assert told["inside_rabbitmq"][0]["channels"] > 10
