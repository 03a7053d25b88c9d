"""Writes what the code knows into the documentation: settings, commands, messages, names, limits.

A page holds blocks between `<!-- generated: KIND ARGUMENT -->` and `<!-- end -->`. Whatever the code knows is
written anew; the column "Meaning" is written by people and kept. `tests/docs` fails while a page is out of date.

    make docs
"""

from __future__ import annotations

import re
import sys
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
from broker import head, messages, payloads, tensors, topology, wire
from broker.transport import Binding, Declaration, Exchange, Queue, Stream
from fluffle.cli import cli
from fluffle.config import Config, Setting, settings
from workers.tasks import CATALOGUE, find_task

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (?P<what>.+?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
UNWRITTEN = "TO BE WRITTEN"  # a meaning that nobody has given yet

Meanings = Mapping[str, str]
Table = list[Sequence[str]]


def main() -> None:
    for page in pages():
        text = page.read_text("utf-8")
        page.write_text(rewritten(text), "utf-8")
        if UNWRITTEN in page.read_text("utf-8"):
            sys.exit(f"{page}: some meanings are {UNWRITTEN}")


def pages() -> list[Path]:
    """Every page of the documentation, the README first."""
    return [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def rewritten(page: str) -> str:
    """The page with its generated blocks made anew from the code."""
    return BLOCK.sub(lambda block: f"{block[1]}{_block(block['what'], block['body'])}{block[4]}", page)


def _block(what: str, body: str) -> str:
    kind, _, argument = what.partition(" ")
    return KINDS[kind](argument, _meanings(body))


def _meanings(body: str) -> Meanings:
    """What people wrote: the last cell of each row, by its first."""
    rows = [_cells(line) for line in body.splitlines() if line.startswith("| `")]
    return {cells[0]: cells[-1] for cells in rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _table(head: Sequence[str], rows: Table) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: object) -> str:
    return f"`{text}`".replace("|", "\\|")


def _power(number: float) -> str:
    """2^20 rather than 1048576."""
    whole = int(number)
    exact = whole == number and whole >= 1024 and whole & (whole - 1) == 0
    return f"2^{whole.bit_length() - 1}" if exact else f"{number:,}"


# -- types -------------------------------------------------------------------------------------------------------

TYPE_NAMES = ("Participant", "RunId", "Sha256", "Count", "Text", "Word", "Metrics", "Scalar", "Settings")
ALIASES: dict[str, Any] = {name: getattr(messages, name) for name in TYPE_NAMES}
PLAIN = {str: "text", int: "integer", float: "number", bool: "boolean", NoneType: "nil"}


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
        return (
            f"list of {_item(arguments[0])}"
            if arguments[-1] is ...
            else f"[{', '.join(map(type_text, arguments))}]"
        )
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
                yield f"{words} {value if isinstance(value, str) else _power(value)}"


LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "max_length": "at most", "pattern": "as"}


def _types(_: str, meanings: Meanings) -> str:
    rows = [
        (_code(name), _unnamed(kind).replace("|", "\\|"), meanings.get(_code(name), UNWRITTEN))
        for name, kind in ALIASES.items()
    ]
    return _table(("Type", "What is allowed", "Meaning"), rows)


# -- messages ----------------------------------------------------------------------------------------------------

RECORDS: dict[str, type[BaseModel]] = {
    record.__name__: record
    for record in (
        *wire.KINDS.values(), messages.Where, head.OpenRound, head.Decision, head.ClosedRound, head.Best,
    )
}  # fmt: skip


def _message(name: str, meanings: Meanings) -> str:
    record = RECORDS[name]
    hints = get_type_hints(record, include_extras=True)
    rows = [
        (
            _code(field),
            type_text(hints[field]).replace("|", "\\|"),
            _default(info),
            meanings.get(_code(field), UNWRITTEN),
        )
        for field, info in record.model_fields.items()
    ]
    return _table(("Field", "Type", "Default", "Meaning"), rows)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    empty = {"": '""', (): "[]", None: "nil", False: "false", True: "true"}
    if isinstance(value, dict):
        return "{}"
    return empty.get(value, f'"{value}"' if isinstance(value, str) else str(value)) if value != 0 else _zero(value)


def _zero(value: object) -> str:
    return str(value).lower()


# -- limits and names --------------------------------------------------------------------------------------------


def _wire_limits(_: str, meanings: Meanings) -> str:
    limits: dict[str, int] = {
        "frame": wire.MAX_FRAME_BYTES,
        "header": wire.MAX_HEADER_BYTES,
        "header from a participant": wire.FROM_PARTICIPANT.header_bytes,
        "items from a participant": wire.FROM_PARTICIPANT.items,
        "chunks of a payload": messages.MAX_ITEMS,
        "chunks in flight": payloads.WINDOW,
        "payload": messages.MAX_MODEL_BYTES,
        "manifest": tensors.MAX_MANIFEST_BYTES,
        "tensors": tensors.MAX_TENSORS,
        "dimensions": tensors.MAX_DIMENSIONS,
        "tensor name": tensors.MAX_NAME,
        "quoted of a refused message": QUOTED_BYTES,
        "lines of the ledger per record": ledger.MOST_LISTED,
        "participants with one shared TrainRound": FANOUT,
    }
    rows = [(_code(name), _size(value), meanings.get(_code(name), UNWRITTEN)) for name, value in limits.items()]
    return _table(("Limit", "Value", "Meaning"), rows)


def _size(value: int) -> str:
    for unit, step in (("TiB", 1 << 40), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= step and value % step == 0:
            return f"{value // step:,} {unit if value != messages.MAX_ITEMS else '× 2^20'}"
    return f"{value:,}"


def _dtypes(_: str, __: Meanings) -> str:
    rows = [(_code(code), _code(dtype.name), str(dtype.itemsize)) for code, dtype in tensors.DTYPES.items()]
    return _table(("Code", "numpy", "Bytes"), rows)


def _topology(_: str, meanings: Meanings) -> str:
    names = topology.Topology("f")
    declared: list[Declaration] = [
        *names.aggregator_declarations(),
        *names.inbox_declarations("p"),
        *names.outbox_declarations("p", topology.MEBI),
        *names.model_declarations("run", topology.MEBI),
    ]
    bound = [thing for thing in declared if isinstance(thing, Binding)]
    rows = [
        (
            _code(_public(thing.name)),
            _kind(thing),
            _bindings(thing.name, bound),
            meanings.get(_code(_public(thing.name)), UNWRITTEN),
        )
        for thing in declared
        if not isinstance(thing, Binding)
    ]
    return _table(("Name", "Kind", "Bound to", "Meaning"), rows)


def _kind(thing: Exchange | Queue | Stream) -> str:
    if isinstance(thing, Exchange):
        return "topic exchange"
    if isinstance(thing, Stream):
        return "stream"
    notes = {
        "single active consumer": thing.single_active_consumer,
        f"delivery limit {thing.delivery_limit}": thing.delivery_limit,
        f"at most {thing.max_length:,} messages" if thing.max_length else "": thing.max_length,
        f"expires unused after {thing.expires_s / 86400:g} days" if thing.expires_s else "": thing.expires_s,
    }
    kind = "quorum queue" if thing.replicated else "durable queue"
    return ", ".join([kind, *(note for note, there in notes.items() if there)])


def _bindings(name: str, bound: Sequence[Binding]) -> str:
    return ", ".join(_code(f"{_public(b.exchange)} {_public(b.pattern)}") for b in bound if b.destination == name)


def _public(name: str) -> str:
    """`fl.f.inbox.p` with its variable parts marked."""
    marked = re.sub(r"^fl\.f\b", "fl.<f>", name)
    return re.sub(r"(?<=\.)p$|^p(?=\.|$)", "<p>", marked).replace("model.run", "model.<run>")


# -- settings ----------------------------------------------------------------------------------------------------


def _settings(section: str, _: Meanings) -> str:
    chosen = [s for s in settings() if (s.name.partition(".")[0] if "." in s.name else "task") == section]
    limits = dict(_setting_limits(Config))
    rows = [
        (
            _code(setting.name), _setting_type(setting, limits[setting.name]), _setting_default(setting),
            _code(setting.flag) if setting.flag else "", setting.description.replace("|", "\\|"),
        )
        for setting in chosen
    ]  # fmt: skip
    return _table(("Setting", "Type", "Default", "Flag", "Meaning"), rows)


def _setting_limits(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _setting_limits(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(_limits(info.metadata))


def _setting_type(setting: Setting, limits: list[str]) -> str:
    shown = " or ".join(map(_code, setting.type.split("|"))) if "|" in setting.type else setting.type
    numbers = [limit for limit in limits if not limit.startswith("as ")] if not setting.is_text else []
    return ", ".join([shown, *numbers])


def _setting_default(setting: Setting) -> str:
    if setting.name == "task":
        return "required"
    if setting.default is None:
        return "the task's"
    return _code(setting.default) if setting.default != "" else "empty"


def _task_defaults(_: str, __: Meanings) -> str:
    keys = sorted({key for name in CATALOGUE for key in find_task(name).defaults})
    rows = [
        (_code(name), entry.summary, *(str(find_task(name).defaults.get(key, "")) for key in keys))
        for name, entry in CATALOGUE.items()
    ]
    return _table(("Task", "What it learns", *(_code(f"train.{key}") for key in keys)), rows)


# -- commands ----------------------------------------------------------------------------------------------------


def _commands(_: str, __: Meanings) -> str:
    return "\n".join(_command(path, command) for path, command in commands())


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, groups before what they hold."""
    yield from _below("fluffle", cli)


def _below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from _below(f"{path} {name}", below)


def _command(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path, max_content_width=1000)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    options = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    rows = [(_code(names), " ".join(meaning.split()).replace("|", "\\|")) for names, meaning in options]
    if isinstance(command, click.Group):
        rows += [(_code(name), below.get_short_help_str(200)) for name, below in sorted(command.commands.items())]
    return f"## {path}\n\n```text\n{usage}\n```\n\n{text}\n\n{_table(('Option or command', 'Meaning'), rows)}"


KINDS: dict[str, Callable[[str, Meanings], str]] = {
    "types": _types,
    "message": _message,
    "limits": _wire_limits,
    "dtypes": _dtypes,
    "topology": _topology,
    "settings": _settings,
    "task-defaults": _task_defaults,
    "commands": _commands,
}

if __name__ == "__main__":
    main()
