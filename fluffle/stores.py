"""From an address to a claim-check store."""

from __future__ import annotations

from broker.errors import ConfigError
from broker.store import Store
from fluffle.config import StoreSection


def opened_store(section: StoreSection) -> Store | None:
    """The store of a configuration, if it names one. Raises ConfigError."""
    return Store.at(section.url) if section.url else None


def keepers_store(section: StoreSection) -> Store | None:
    """The same for an aggregator, who must be able to list and delete."""
    store = opened_store(section)
    if store is not None and not store.keeps:
        raise ConfigError(
            f"store.url = {section.url}: over HTTP an aggregator could neither list nor delete: give it the folder "
            "or the bucket behind that web server"
        )
    return store
