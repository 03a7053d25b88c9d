"""Traces: what was measured elsewhere, in a CSV file with a line of names first, or as JSON objects, one a line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from broker.errors import ConfigError

MOST_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One line of data, by the names of its columns, and where it stands."""

    place: str
    values: Mapping[str, object]

    def seconds(self, name: str) -> float:
        """The number in that column. Raises ConfigError unless it is finite and at least 0."""
        value = self.values[name]
        seconds = number(str(value)) if not isinstance(value, bool) else math.nan
        if not 0 <= seconds < math.inf:
            self.refuse(f"{name} is {value!r}: write seconds, a number of at least 0")
        return seconds

    def refuse(self, why: str) -> NoReturn:
        raise ConfigError(f"{self.place}: {why}")


def number(text: str) -> float:
    """The number that a text is; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_rows(file: Path, *columns: Collection[str]) -> list[Row]:
    """The lines of a trace, all of which have the same columns: one of the sets that are allowed.

    Raises ConfigError that names the line and the remedy.
    """
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"trace:{file}: cannot be read ({error}): name a CSV or JSON-lines file") from None
    rows = list(_json_rows(file, text) if text.lstrip().startswith("{") else _csv_rows(file, text))
    if not 0 < len(rows) <= MOST_ROWS:
        raise ConfigError(f"trace:{file}: has {len(rows)} lines of data: give it 1 to {MOST_ROWS}")
    allowed = " or ".join(", ".join(names) for names in columns)
    for row in rows:
        if set(row.values) != set(rows[0].values) or set(row.values) not in map(set, columns):
            row.refuse(f"has the columns {', '.join(map(str, row.values))}: every line must have {allowed}")
    return rows


def own_rows(rows: Sequence[Row], participants: Sequence[str]) -> dict[str, list[Row]]:
    """The lines of each participant, in order; nobody else may have any."""
    own: dict[str, list[Row]] = {name: [] for name in participants}
    for row in rows:
        name = row.values["participant"]
        if not isinstance(name, str) or name not in own:
            row.refuse(f"participant is {name!r}, and there is none of that name: there are {_span(participants)}")
        own[name].append(row)
    return own


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _csv_rows(file: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), restkey="more than the first line names", restval="", strict=True)
    try:
        for values in reader:
            yield Row(f"{file}, line {reader.line_num}", values)
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: is no CSV ({error}): mend it") from None


def _json_rows(file: Path, text: str) -> Iterator[Row]:
    for line_number, line in enumerate(text.splitlines(), 1):
        row = Row(f"{file}, line {line_number}", {})
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            row.refuse(f"is no JSON ({error}): write one object a line")
        if not isinstance(values, dict):
            row.refuse(f"is {line.strip()[:40]!r}: write one JSON object a line")
        yield Row(row.place, values)
