"""Writes what the code knows into the documentation: settings, commands, messages, names, limits.

A page holds blocks between `<!-- generated: KIND ARGUMENT -->` and `<!-- end -->`. Whatever the code knows is
written anew; the column "Meaning" is written by people and kept. `make docs` does it, and `tests/docs` fails
while a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aggregator import ledger
from aggregator.announcer import FANOUT
from aggregator.daemon import QUOTED_BYTES
from benchmarks.codecs import Point
from benchmarks.codecs import page as codecs_table
from benchmarks.measure import Line, table
from broker import head, messages, payloads, tensors, topology, wire
from broker.transport import Binding, Declaration, Exchange, Queue, Stream
from fluffle.cli import cli
from fluffle.config import Config, Setting, settings
from fluffle.sweep_results import table_of
from workers.tasks import CATALOGUE, find_task

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (?P<what>.+?) -->\n\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
UNWRITTEN = "TO BE WRITTEN"  # a meaning that nobody has given yet

Meanings = Mapping[str, str]


def main() -> None:
    for page in pages():
        text = rewritten(page.read_text("utf-8"))
        page.write_text(text, "utf-8")
        if UNWRITTEN in text:
            sys.exit(f"{page}: the meaning of something new is still {UNWRITTEN}")


def pages() -> list[Path]:
    """Every page of the documentation, the README first."""
    root = DOCS.parent
    return [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def rewritten(page: str) -> str:
    """The page with its generated blocks made anew from the code."""
    return BLOCK.sub(lambda block: f"{block[1]}{_made(block['what'], block['body'])}\n{block[4]}", page)


def _made(what: str, body: str) -> str:
    kind, _, argument = what.partition(" ")
    return KINDS[kind](argument, _meanings(body))


def _meanings(body: str) -> Meanings:
    """What people wrote: the last cell of each row, by its first."""
    rows = [_cells(line) for line in body.splitlines() if line.startswith("| `")]
    return {cells[0]: cells[-1] for cells in rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: object) -> str:
    return f"`{text}`".replace("|", "\\|")


def _kept(meanings: Meanings, name: str) -> str:
    return meanings.get(_code(name)) or UNWRITTEN


# -- types -------------------------------------------------------------------------------------------------------

TYPE_NAMES = ("Participant", "RunId", "Sha256", "Count", "Text", "Word", "Metrics", "Scalar", "Settings")
ALIASES: dict[str, Any] = {name: getattr(messages, name) for name in TYPE_NAMES}
PLAIN = {str: "text", int: "integer", float: "number", bool: "boolean", NoneType: "nil"}
LIMITS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "max_length": "length at most",
    "pattern": "as",
}


def type_text(kind: Any) -> str:
    """A type as people say it: `Count`, `list of Participant`, `"train" or "none"`."""
    return next((name for name, alias in ALIASES.items() if alias == kind), "") or _unnamed(kind)


def _unnamed(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return ", ".join([_unnamed(arguments[0]), *_limits(arguments[1:])])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(type_text, arguments))
    if get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if get_origin(kind) is tuple:
        several = arguments[-1] is ...
        return f"list of {_item(arguments[0])}" if several else f"[{', '.join(map(type_text, arguments))}]"
    if get_origin(kind) is dict:
        return f"map of {_item(arguments[0])} to {_item(arguments[1])}"
    return PLAIN.get(kind) or str(kind.__name__)


def _item(kind: Any) -> str:
    text = type_text(kind)
    return f"({text})" if "," in text and not text.startswith("[") else text


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            yield from _limits(constraint.metadata)
        for name, words in LIMITS.items():
            value = getattr(constraint, name, None)
            if value is not None:
                yield f"{words} {_code(value) if isinstance(value, str) else _number(value)}"


def _number(value: float) -> str:
    """`2^20` rather than 1048576."""
    whole = int(value)
    is_power = whole == value and whole >= 1024 and whole & (whole - 1) == 0
    return f"2^{whole.bit_length() - 1}" if is_power else f"{value:,}"


def _types(_: str, meanings: Meanings) -> str:
    rows = [(_code(name), _unnamed(kind), _kept(meanings, name)) for name, kind in ALIASES.items()]
    return _table(("Type", "What is allowed", "Meaning"), rows)


# -- messages ----------------------------------------------------------------------------------------------------

PARTS: tuple[type[BaseModel], ...] = (
    messages.Where, messages.Difference, head.OpenRound, head.Decision, head.ClosedRound, head.Best, head.Obeyed,
)  # fmt: skip
RECORDS = {record.__name__: record for record in (*wire.KINDS.values(), *PARTS)}


def _message(name: str, meanings: Meanings) -> str:
    record = RECORDS[name]
    hints = get_type_hints(record, include_extras=True)
    rows = [
        (_code(field), type_text(hints[field]), _default(info), _kept(meanings, field))
        for field, info in record.model_fields.items()
    ]
    return _table(("Field", "Type", "Default", "Meaning"), rows)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    shown = {None: "nil", False: "false", True: "true", (): "[]"}
    is_plain = isinstance(info.default, str | int | float | dict) and not isinstance(info.default, bool)
    return json.dumps(info.default) if is_plain else shown[info.default]


# -- limits and names --------------------------------------------------------------------------------------------

MIB, KIB = 1 << 20, 1 << 10
WIRE_LIMITS = {
    "frame": f"{wire.MAX_FRAME_BYTES // MIB} MiB",
    "header": f"{wire.MAX_HEADER_BYTES // MIB} MiB",
    "header from a participant": f"{wire.FROM_PARTICIPANT.header_bytes // KIB} KiB",
    "items from a participant": f"{wire.FROM_PARTICIPANT.items}",
    "payload": f"{_number(messages.MAX_MODEL_BYTES)} bytes",
    "chunks of a payload": _number(messages.MAX_ITEMS),
    "smallest chunks": f"{payloads.MIN_CHUNK_BYTES:,} bytes",
    "chunks in flight": f"{payloads.WINDOW}",
    "smallest parts": f"{payloads.MIN_PART_BYTES // KIB} KiB",
    "manifest": f"{tensors.MAX_MANIFEST_BYTES // MIB} MiB",
    "tensors": f"{tensors.MAX_TENSORS:,}",
    "dimensions": f"{tensors.MAX_DIMENSIONS}",
    "tensor name": f"{tensors.MAX_NAME} characters",
    "quote of a refused message": f"{QUOTED_BYTES // KIB} KiB",
    "listed in one record": f"{ledger.MOST_LISTED:,}",
    "one TrainRound for all": f"{FANOUT} participants",
}


def _wire_limits(_: str, meanings: Meanings) -> str:
    rows = [(_code(name), value, _kept(meanings, name)) for name, value in WIRE_LIMITS.items()]
    return _table(("Limit", "Value", "Meaning"), rows)


def _dtypes(_: str, __: Meanings) -> str:
    rows = [(_code(code), _code(dtype.name), str(dtype.itemsize)) for code, dtype in tensors.DTYPES.items()]
    return _table(("Code", "In numpy", "Bytes"), rows)


def _topology(_: str, meanings: Meanings) -> str:
    names = topology.Topology("f")
    declared: list[Declaration] = [
        *names.aggregator_declarations(),
        *names.inbox_declarations("p"),
        *names.operator_declarations("nonce"),
        *names.outbox_declarations("p", MIB),
        *names.model_declarations("run", MIB),
        *names.state_declarations("run", MIB),
    ]
    bound = [thing for thing in declared if isinstance(thing, Binding)]
    things = [(_public(thing.name), thing) for thing in declared if not isinstance(thing, Binding)]
    rows = [(_code(name), _kind(thing), _bindings(thing, bound), _kept(meanings, name)) for name, thing in things]
    return _table(("Name", "Kind", "Bound to", "Meaning"), rows)


def _kind(thing: Exchange | Queue | Stream) -> str:
    if isinstance(thing, Exchange):
        return "topic exchange"
    if isinstance(thing, Stream):
        return "stream"
    notes = ["quorum queue" if thing.replicated else "durable queue"]
    notes += ["single active consumer"] if thing.single_active_consumer else []
    notes += [f"delivery limit {thing.delivery_limit:,}"] if thing.delivery_limit else []
    notes += [f"length limit {thing.max_length:,}"] if thing.max_length else []
    notes += [f"expires after {_lasting(thing.expires_s)} unused"] if thing.expires_s else []
    return ", ".join(notes)


def _lasting(seconds: float) -> str:
    return f"{seconds / 86400:g} days" if seconds >= 86400 else f"{seconds:g} seconds"


def _bindings(thing: Exchange | Queue | Stream, bound: Sequence[Binding]) -> str:
    mine = [binding for binding in bound if binding.destination == thing.name]
    keys = ", ".join(_code(_public(binding.pattern)) for binding in mine)
    return f"{_code(_public(mine[0].exchange))} with {keys}" if mine else ""


def _public(name: str) -> str:
    """`fl.f.inbox.p` with its variable parts marked."""
    marked = re.sub(r"^fl\.f\b", "fl.<f>", name)
    return (
        re.sub(r"(?<=\.)p$|^p(?=\.|$)", "<p>", marked)
        .replace("model.run", "model.<run>")
        .replace("state.run", "state.<run>")
        .replace("operator.nonce", "operator.<nonce>")
    )


# -- settings ----------------------------------------------------------------------------------------------------


def _settings(section: str, _: Meanings) -> str:
    limits = dict(_setting_limits(Config))
    rows = [
        (
            _code(setting.name),
            _setting_type(setting, limits[setting.name]),
            _setting_default(setting),
            _code(setting.flag) if setting.flag else "",
            setting.description.replace("|", "\\|"),
        )
        for setting in settings()
        if setting.name.partition(".")[0] == section
    ]
    return _table(("Setting", "Type", "Default", "Flag", "Meaning"), rows)


def _setting_limits(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _setting_limits(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(_limits(info.metadata))


def _setting_type(setting: Setting, limits: list[str]) -> str:
    kind = " or ".join(map(_code, setting.type.split("|"))) if "|" in setting.type else setting.type
    return ", ".join([kind, *(limits if not setting.is_text else [])])


def _setting_default(setting: Setting) -> str:
    if setting.name == "task":
        return "required"
    if setting.default is None:
        return "the task's"
    return _code(setting.written) if setting.default != "" else "empty"


def _task_defaults(_: str, __: Meanings) -> str:
    keys = sorted({key for name in CATALOGUE for key in find_task(name).defaults})
    rows = [
        (_code(name), entry.summary, *(str(find_task(name).defaults.get(key, "")) for key in keys))
        for name, entry in CATALOGUE.items()
    ]
    return _table(("Task", "What it learns", *(_code(f"train.{key}") for key in keys)), rows)


# -- commands ----------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, groups before what they hold."""
    yield from _below("fluffle", cli)


def _below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from _below(f"{path} {name}", below)


def _commands(_: str, __: Meanings) -> str:
    return "\n".join(_command(path, command) for path, command in commands())


def _command(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path, max_content_width=1000)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n"))
    rows = list(_options(command, context))
    if isinstance(command, click.Group):
        rows += [(_code(name), below.get_short_help_str(200)) for name, below in sorted(command.commands.items())]
    table = f"\n{_table(('Option or command', 'Meaning'), rows)}" if rows else ""
    return f"## {path}\n\n```text\n{usage}\n```\n\n{text}\n{table}"


def _options(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    for option in command.params:
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None:
            yield _code(record[0]), " ".join(record[1].split()).replace("|", "\\|")


# -- what was measured -------------------------------------------------------------------------------------------

RESULTS = DOCS.parent / "benchmarks" / "results"


def _lines(names: str) -> list[Line]:
    found = [json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names.split()]
    return [Line(**line) for result in found for line in result["lines"]]


def _measured(argument: str, _: Meanings) -> str:
    """All lines of one benchmark, or those without an aim, and when and with what they were measured."""
    name, _, without_aims = argument.partition(" ")
    told = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    versions = ", ".join(f"{package} {number}" for package, number in told["versions"].items())
    when = f"`{told['command']}`, {told['date'][:10]}, {told['cores']} cores ({told['processor']}), {versions}."
    lines = [line for line in _lines(name) if not (without_aims and line.aim)]
    return f"{table(lines)}\n\n{wrapped(when)}\n"


def _aims(names: str, _: Meanings) -> str:
    """The lines of several benchmarks that have an aim."""
    return table([line for line in _lines(names) if line.aim]) + "\n"


def _codecs(name: str, _: Meanings) -> str:
    """Accuracy and bytes of every codec."""
    told = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return codecs_table([Point(**point) for point in told["details"]["points"]]) + "\n"


def _sweep(name: str, _: Meanings) -> str:
    """A sweep's table, and when and with what it was run."""
    told = json.loads((RESULTS / "sweeps" / f"{name}.json").read_text("utf-8"))
    head, *rows = table_of(told)
    versions = ", ".join(f"{package} {number}" for package, number in told["versions"].items())
    seeds = ", ".join(map(str, told["sweep"]["seeds"]))
    made = f"{told['date'][:10]}, {told['cores']} cores ({told['processor']}), {versions}"
    when = f"`benchmarks/sweeps/{name}.toml`, {told['metric']}, seeds {seeds}, {made}."
    return f"{_table(head, rows)}\n{wrapped(when)}\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)


KINDS: dict[str, Callable[[str, Meanings], str]] = {
    "types": _types,
    "message": _message,
    "limits": _wire_limits,
    "dtypes": _dtypes,
    "topology": _topology,
    "settings": _settings,
    "task-defaults": _task_defaults,
    "commands": _commands,
    "measured": _measured,
    "aims": _aims,
    "codecs": _codecs,
    "sweep": _sweep,
}

if __name__ == "__main__":
    main()
