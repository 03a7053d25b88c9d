"""The documentation is true: its examples run, its tables are what the code says, its names and links exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import pytest
import structlog
from click.testing import CliRunner
from doc_blocks import FENCE, ROOT, blocks, run

from broker import head, messages, topology, wire
from fluffle.cli import cli
from fluffle.config import SECTIONS, settings
from fluffle.layers import NOT_SETTINGS
from fluffle.learning import task_defaults
from fluffle.sweep import load_sweep
from workers.hf.recipe import Tuning
from workers.tasks import CATALOGUE

DOCS = ROOT / "docs"
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
KNOWN_HOSTS = {
    "docs.aws.amazon.com", "huggingface.co", "keepachangelog.com", "msgpack.org", "semver.org",
    "support.huaweicloud.com", "tanzu.vmware.com", "www.rabbitmq.com",
}  # fmt: skip
OTHER_WORDS = r"\b(clients?|(?<!web\s)servers?|masters?|slaves?|nodes?|coordinators?|silos?)\b"
PRIVATE = (
    r"/work\b",
    r"/root\b",
    r"/home\b",
    r"/tmp\b",
    r"\bshared/",
    r"\b(?!127\.0\.0\.1)\d{1,3}(\.\d{1,3}){3}\b",
)
FOLDERS = ("aggregator", "broker", "workers", "fluffle", "tests", "docs", "examples", "benchmarks", "deploy", ".ci")


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()
PAGES: list[Path] = generate.pages()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run a page in; what it imports from there and how it logs is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    structlog.reset_defaults()


@each_page
def test_every_example_works(page: Path, scratch: Path) -> None:
    for block in blocks(page):
        run(block)


@each_page
def test_generated_tables_are_what_the_code_says(page: Path) -> None:
    text = page.read_text("utf-8")
    assert generate.rewritten(text) == text, "out of date: run `make docs`"
    assert generate.UNWRITTEN not in text, "somebody must say what it means"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        if "://" in target:
            assert target.split("/")[2] in KNOWN_HOSTS, target
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> list[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    found = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(found) == len(set(found)), f"{page.name}: two headings have the same name"
    return found


@each_page
def test_named_files_exist(page: Path) -> None:
    for span in CODE_SPAN.findall(page.read_text("utf-8")):
        if span.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and " " not in span:
            assert (ROOT / span).exists(), f"{page.name}: {span}"


@each_page
def test_named_settings_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    names = {setting.name for setting in settings()} | {f"train.{field.name}" for field in fields(Tuning)}
    named = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z][a-z0-9_]*\b", "\n".join(CODE_SPAN.findall(text)))
    assert {name for name in named if not name.endswith((".py", ".toml"))} <= names
    variables = set(re.findall(r"FLUFFLE_[A-Z_]*[A-Z]", text))
    assert variables <= {setting.env for setting in settings()} | NOT_SETTINGS


@each_page
def test_one_word_for_one_thing(page: Path) -> None:
    prose = CODE_SPAN.sub("", FENCE.sub("", page.read_text("utf-8")))
    assert not re.findall(OTHER_WORDS, prose, re.IGNORECASE), "see docs/glossary.md"


@pytest.mark.parametrize(
    "file", [*PAGES, *(ROOT / "examples").rglob("*.py"), ROOT / "NOTICE"], ids=lambda f: f.name
)
def test_nothing_private_is_named(file: Path) -> None:
    text = file.read_text("utf-8")
    for pattern in PRIVATE:
        assert not re.search(pattern, text), pattern
    assert set(re.findall(r"https?://(?!127\.0\.0\.1\b)([^/\s)\"'`]+)", text)) <= KNOWN_HOSTS


def commands(path: str = "fluffle", command: click.Command = cli) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(f"{path} {name}", below)


@pytest.mark.parametrize(
    ("path", "command"), [*commands()], ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_documented(path: str, command: click.Command) -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    section = re.search(rf"^## {path}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert all(name in section[1] for name in option.opts), option.name
            assert option.help, f"{path} {option.name} does not say what it is for"


def test_every_setting_is_documented() -> None:
    page = (DOCS / "settings.md").read_text("utf-8")
    for setting in settings():
        assert f"| `{setting.name}` |" in page
        assert setting.description, f"{setting.name} does not say what it is for"
        assert not setting.flag or f"`{setting.flag}`" in page


def test_every_message_and_field_is_documented() -> None:
    page = (DOCS / "wire-format.md").read_text("utf-8")
    parts = (messages.Where, head.OpenRound, head.Decision, head.ClosedRound, head.Best, head.Obeyed)
    for record in (*wire.KINDS.values(), *parts):
        section = re.search(rf"<!-- generated: message {record.__name__} -->(.*?)<!-- end -->", page, re.DOTALL)
        assert section, record.__name__
        for field in record.model_fields:
            assert f"| `{field}` |" in section[1], f"{record.__name__}.{field}"


def test_every_kind_and_name_on_the_broker_is_documented() -> None:
    page = (DOCS / "wire-format.md").read_text("utf-8")
    for kind in topology.UP_KINDS:
        assert f"### {kind}" in page
    for name in re.findall(r"^(fl\.<f>\.\S+)", topology.__doc__ or "", re.MULTILINE):
        assert f"`{name}`" in page


def test_the_glossary_has_the_words_that_messages_use() -> None:
    page = (DOCS / "glossary.md").read_text("utf-8")
    kinds = (messages.Verdict, messages.Fate, messages.Work)
    for word in {word for kind in kinds for word in get_args(kind)}:
        assert f"`{word}`" in page, word


def test_every_task_is_in_the_numbers_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in CATALOGUE:
        assert f"| `{name}` |" in readme


def demo() -> str:
    """The command that `make demo` runs."""
    recipe = re.search(r"^demo:.*\n\t\$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe
    return recipe[1]


def test_the_readme_shows_the_demo_that_make_runs() -> None:
    assert f"```bash\n{demo()}\n```" in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_and_the_changelog_name_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for page in ("README.md", "CHANGELOG.md"):
        assert version in (ROOT / page).read_text("utf-8")


@pytest.mark.slow
def test_the_demo_reaches_what_the_readme_says(scratch: Path) -> None:
    said = re.search(r"finished.*\n  accuracy (\d\.\d+)", (ROOT / "README.md").read_text("utf-8"))
    assert said
    outcome = CliRunner().invoke(cli, demo().split()[1:], prog_name="fluffle")
    reached = re.search(r"finished.*\n  accuracy (\d\.\d+)", outcome.output)
    assert reached
    assert float(reached[1]) == pytest.approx(float(said[1]), abs=0.01)


@pytest.mark.parametrize("file", [*(ROOT / "examples").glob("*.py")], ids=lambda file: file.stem)
def test_examples_run(file: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    task = f"examples.{file.stem}:TASK"
    outcome = CliRunner().invoke(
        cli, ["simulate", task, "--participants", "3", "--rounds", "2"], prog_name="fluffle"
    )
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize("file", [*(ROOT / "benchmarks" / "sweeps").glob("*.toml")], ids=lambda file: file.stem)
def test_results_are_those_of_the_committed_sweeps(file: Path) -> None:
    told = json.loads((ROOT / "benchmarks" / "results" / "sweeps" / f"{file.stem}.json").read_text("utf-8"))
    sweep = load_sweep(file, defaults=cache(task_defaults))
    assert [cell["digest"] for cell in told["cells"]] == [cell.digest for cell in sweep.cells], "run `make results`"
    assert not told["failed"]
    page = (DOCS / "results.md").read_text("utf-8")
    assert f"<!-- generated: sweep {file.stem} -->" in page
    assert f"](results-{file.stem}.png)" in page
