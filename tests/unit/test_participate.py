"""The journal of a worker's process: locked, and blamed for its own errors only."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.errors import ConfigError, StateError
from fluffle.config import from_values, load_site
from fluffle.participate import opened_journals, participants


def test_an_error_of_the_work_inside_is_not_the_journals(tmp_path: Path) -> None:
    config = load_site(from_values({"site.participant": "p01", "site.journal": str(tmp_path / "journal")}))
    with pytest.raises(ConnectionResetError), opened_journals(config):
        raise ConnectionResetError("the network's")
    taken = pytest.raises(StateError, match="another worker is using this journal")
    with opened_journals(config), taken, opened_journals(config):
        pass
    with opened_journals(config):
        pass  # it was given back


def test_names_and_ranges_of_participants() -> None:
    assert participants("p01") == ["p01"]
    assert participants("north, p-9..p-11,p001..p003") == ["north", "p-9", "p-10", "p-11", "p001", "p002", "p003"]


@pytest.mark.parametrize("named", ["p01,p01", "p03..p01", "p1..p999999999", "p01..p03,p02"])
def test_names_that_cannot_be_meant(named: str) -> None:
    with pytest.raises(ConfigError, match=r"site\.participant"):
        participants(named)


def test_several_journals_lie_beside_each_other(tmp_path: Path) -> None:
    config = load_site(from_values({"site.participant": "p01..p03", "site.journal": str(tmp_path)}))
    with opened_journals(config) as journals:
        assert list(journals) == ["p01", "p02", "p03"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p01", "p02", "p03"]
