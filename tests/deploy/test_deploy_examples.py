"""deploy/examples: runs and a site that the real loader takes, and that say what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_lines import DEPLOY, load, unknown_settings

from fluffle.config import from_values, load_config
from fluffle.layers import from_toml

EXAMPLES = DEPLOY / "examples"
RUNS = [EXAMPLES / f"{name}.toml" for name in ("run", "cross-silo", "edge")]


def test_there_are_no_others() -> None:
    assert set(EXAMPLES.iterdir()) == {*RUNS, EXAMPLES / "site.toml"}


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_a_run_can_be_loaded(file: Path) -> None:
    config = load(file)
    assert config.run.id
    assert config.evaluation.mode != "central", "the aggregator of deploy/ has no torch"
    assert config.round.quorum
    assert config.broker.liveness_s >= 3 * config.broker.heartbeat_s, "one lost heartbeat is no departure"


def test_hospitals_wait_for_everybody() -> None:
    config = load(EXAMPLES / "cross-silo.toml")
    assert config.round.quorum == config.round.target == config.round.participants == 4
    assert (config.task, config.data.partition) == ("heart", "natural")


def test_machines_that_sleep_are_asked_in_plenty() -> None:
    asked = load(EXAMPLES / "edge.toml").round
    assert asked.quorum < asked.target < asked.cohort < asked.participants
    assert asked.late == "fold"


def test_a_site_has_settings_that_exist() -> None:
    assert not unknown_settings(EXAMPLES / "site.toml")
    load_config(from_values({"task": "digits"}), from_toml(EXAMPLES / "site.toml"))
