"""The journal of a worker's process: locked, and blamed for its own errors only."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.errors import StateError
from fluffle.config import from_values, load_site
from fluffle.participate import opened_journal


def test_an_error_of_the_work_inside_is_not_the_journals(tmp_path: Path) -> None:
    config = load_site(from_values({"site.participant": "p01", "site.journal": str(tmp_path / "journal")}))
    with pytest.raises(ConnectionResetError), opened_journal(config):
        raise ConnectionResetError("the network's")
    taken = pytest.raises(StateError, match="another worker is using this journal")
    with opened_journal(config), taken, opened_journal(config):
        pass
    with opened_journal(config):
        pass  # it was given back
