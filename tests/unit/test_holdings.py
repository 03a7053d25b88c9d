"""Who holds what: counts, how skewed they are, and what people see of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fluffle.cli import cli
from fluffle.config import Config, from_values, load_config
from fluffle.holdings import draw_holdings, holdings, holdings_text
from workers.data import Dataset
from workers.partition import Shard, Shares


def config(**values: str | int) -> Config:
    return load_config(from_values({"task": "digits", **values}))


def of(labels: list[int] | list[float]) -> Dataset:
    return Dataset(np.zeros((len(labels), 1)), np.array(labels))


def shared(*labels: list[int] | list[float]) -> Shares:
    shards = tuple(Shard(f"p{number:02}", of(own), of(own[:1])) for number, own in enumerate(labels, 1))
    return Shares(of([one for own in labels for one in own]), of([own[0] for own in labels]), shards)


def test_skew_is_measured_as_defined() -> None:
    found = holdings(config(), shared([0, 0, 0, 0], [0, 0, 7, 7], [7, 7, 7, 7]))
    assert found["classes"] == [0, 7]
    one, two, three = found["participants"]
    assert (one["by_class"], two["by_class"], three["by_class"]) == ([4, 0], [2, 2], [0, 4])
    assert [one["distance"], two["distance"], three["distance"]] == pytest.approx([0.5, 0.0, 0.5])
    assert [one["effective_classes"], two["effective_classes"]] == pytest.approx([1, 2])
    assert (found["everybody"]["by_class"], found["everybody"]["examples"]) == ([6, 6], 12)
    assert (found["mean_distance"], found["mean_effective_classes"]) == pytest.approx((1 / 3, 4 / 3))
    uneven = holdings(config(), shared([0] * 9 + [1], [1] * 10))["participants"][0]
    assert uneven["effective_classes"] == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)))
    assert uneven["distance"] == pytest.approx(0.45)


def test_it_is_told_in_words_and_drawn() -> None:
    found = holdings(config(), shared([0, 0, 1], [1, 1, 1]))
    text = holdings_text(found)
    assert text.splitlines()[0].split() == [
        "PARTICIPANT", "EXAMPLES", "HELD", "OUT", "0", "1", "DISTANCE", "EFFECTIVE", "CLASSES",
    ]  # fmt: skip
    assert text.splitlines()[3].split() == ["everybody", "6", "2", "2", "4", "0.000", "1.89"]
    assert "2 participants, iid: 3 to 3 examples; on average 0.333 from everybody's classes" in text
    bars = draw_holdings(found).axes[0].containers
    assert [[bar.get_width() for bar in group] for group in bars] == [[2, 0], [1, 3]]
    assert [[bar.get_x() for bar in group] for group in bars] == [[0, 0], [2, 0]]


def test_measured_targets_have_sizes_only_and_many_classes_no_columns() -> None:
    measured = holdings(config(), shared([0.5, 1.5], [2.5]))
    assert measured["participants"][1] == {"participant": "p02", "examples": 1, "held_out": 1}
    assert "1 to 2 examples; the targets are measured numbers" in holdings_text(measured)
    assert [bar.get_width() for bar in draw_holdings(measured).axes[0].containers[0]] == [2, 1]
    many = holdings(config(), shared(list(range(40)), list(range(40))))
    assert holdings_text(many).splitlines()[1].split() == ["p01", "40", "1", "0.000", "40.00"]
    assert not draw_holdings(many).legends


def test_the_command_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["data", "show", "digits", "--participants", "4", "--partition", "quantity:1", "--picture", "held.png"]
    outcome = CliRunner().invoke(cli, [*asked, "--set", "data.imbalance=20", "--json", "held.json"])
    assert outcome.exit_code == 0, outcome.output
    assert "everybody" in outcome.output
    assert Path("held.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("held.json").read_text())
    assert found["everybody"]["examples"] == sum(one["examples"] for one in found["participants"]) < 600
    first, *_, last = found["everybody"]["by_class"]
    assert first == pytest.approx(20 * last, rel=0.05)
    assert CliRunner().invoke(cli, ["data", "show", "digits", "--partition", "quantity:0"]).exit_code != 0
