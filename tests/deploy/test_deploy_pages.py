"""docs/deploy.md and docs/operations.md: command lines, sizes, events and fields are those of the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_lines import DEPLOY, ROOT, check, check_all

from aggregator.status import RunStatus
from broker.topology import Topology
from broker.transport import Queue, Stream

DEPLOYMENT, OPERATIONS = ROOT / "docs" / "deploy.md", ROOT / "docs" / "operations.md"
PACKAGES = ("broker", "aggregator", "workers", "fluffle")
PAGES = [DEPLOYMENT, OPERATIONS]
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
GIGA = 10**9


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def lines(page: Path) -> Iterator[list[str]]:
    """Every command line of Fluffle in a page's blocks, also behind `docker compose exec SERVICE`."""
    for block in FENCE.findall(page.read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"^\s*(?:docker compose .* exec \S+ +)?fluffle (.*)", line)
            if found:
                yield shlex.split(found[1])


@each_page
def test_command_lines_are_those_of_fluffle(page: Path) -> None:
    found = list(lines(page))
    assert found
    check_all(found)


@each_page
def test_named_commands_exist(page: Path) -> None:
    for span in re.findall(r"`fluffle ([a-z][^`\n]*)`", prose(page)):
        try:
            check(span.split(), complete=False)
        except click.UsageError as error:
            pytest.fail(f"{span}: {error}")


@each_page
def test_files_that_are_copied_exist(page: Path) -> None:
    """What `test_docs` checks in words, here in the blocks."""
    text = "\n".join(FENCE.findall(page.read_text("utf-8")))
    for name in re.findall(r"(?<![\w/])deploy/(?!secrets)[\w./@-]+", text):
        assert (ROOT / name).exists(), name


def test_the_worked_example_is_what_the_code_makes_of_it() -> None:
    model, participants = 100 * 10**6, 20
    topology = Topology("f")

    def most(streams: list[object]) -> int:
        return sum(one.max_bytes + one.segment_bytes for one in streams if isinstance(one, Stream))

    base = most([*topology.aggregator_declarations()])
    models = most([*topology.model_declarations("run", model)])
    outboxes = participants * most([*topology.outbox_declarations("p", model + (1 << 20))])
    page = OPERATIONS.read_text("utf-8")
    assert f"| {base / GIGA:.2f} GB |" in page
    assert f"make {models / GIGA:.1f} GB of models, {outboxes / GIGA:.1f} GB of outboxes" in " ".join(page.split())
    others = 0.06 + 0.2
    assert f"and {(base + models + outboxes) / GIGA + others:.1f} GB in all" in page


def test_the_rejected_queue_and_the_inbox_are_as_described() -> None:
    declared = [*Topology("f").aggregator_declarations(), *Topology("f").inbox_declarations("p")]
    queues = {thing.name: thing for thing in declared if isinstance(thing, Queue)}
    page = OPERATIONS.read_text("utf-8")
    assert f"{queues['fl.f.rejected'].max_length:,} messages" in page
    assert f"expires by itself after {(queues['fl.f.inbox.p'].expires_s or 0) / 86400:g} days" in page
    assert [name for name, queue in queues.items() if queue.replicated] == ["fl.f.head"]


def test_events_are_those_that_are_logged() -> None:
    table = OPERATIONS.read_text("utf-8").partition("### Log events")[2].partition("## Backups")[0]
    events = {
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in row.strip("`").split("`, `")
    }
    assert len(events) > 15
    code = "".join(file.read_text("utf-8") for folder in PACKAGES for file in (ROOT / folder).rglob("*.py"))
    for event in events:
        assert f'"{event}"' in code, event


def test_fields_are_those_of_the_status() -> None:
    table = OPERATIONS.read_text("utf-8").partition("| Field | Meaning |")[2].partition("\n\n")[0]
    fields = {
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in row.strip("`").split("`, `")
    }
    assert fields
    assert fields <= set(RunStatus.model_fields)


def test_the_limits_named_are_those_of_the_file() -> None:
    conf = (DEPLOY / "rabbitmq.conf").read_text("utf-8")
    table = OPERATIONS.read_text("utf-8").partition("## RabbitMQ: policies")[2].partition("\n\n")[2]
    names = re.findall(r"`([a-z_.]+[a-z*])`", "".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)[:5]))
    assert len(names) >= 5
    for name in names:
        assert re.search(rf"^{re.escape(name.rstrip('*'))}", conf, re.MULTILINE), name


def test_the_versions_named_are_those_that_were_used() -> None:
    page = DEPLOYMENT.read_text("utf-8")
    image = re.findall(r"image: rabbitmq:(\S+?)-management", (DEPLOY / "compose.yaml").read_text())
    assert image == re.findall(
        r"image: rabbitmq:(\S+?)-management", (DEPLOY / "kubernetes" / "rabbitmq.yaml").read_text()
    )
    assert f"image of RabbitMQ is {image[0]}" in " ".join(page.split())
