"""Changes that know the form of what they change: frames, msgpack, safetensors, JSON, TOML, lists of parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

from tests.fuzz import change

Mutate = Callable[[bytes, Random], bytes]

LARGEST_BYTES = 96 << 10  # inputs do not grow beyond: a million of them shall be quick
LARGE_HEADER_BYTES = 8 << 10  # beyond, taking one apart costs more than it finds
MOST_ITEMS = 3000
NINES = 10**4300 - 1  # the longest number that Python reads as text; one more cannot be written
NUMBERS = [
    0, 1, -1, 2, 63, 64, 65, 255, 1 << 20, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 47, (1 << 48) - 1, 1 << 48,
    (1 << 53) - 1, 1 << 53, (1 << 53) + 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63),
    0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", "a", "A", "p01", "p-bad", "run-1", "aggregator", "train", "delta", "gradient", "none", "stream", "inline",
    "counted", "0" * 64, "f" * 63, "a" * 41, "a" * 201, "x" * 3000, "é", "\0", "a\n", "🐇" * 50, "kind", "update",
    "F16", "BOOL", "I64", "../../etc/passwd", "self", "__class__", "__metadata__", "\ud800",
]  # fmt: skip
TOKENS = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\ud800", b"null", b"true", b"NaN", b"Infinity", b"1e999",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"[[],[]],", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"=", b".", b"#",
    b"'''", b'"""', b"[[a]]\n", b"[a.b.c]\n", b"a" + b".a" * 3000 + b"=1\n", b"2021-13-45", b"inf", b"0x", b"\n",
]  # fmt: skip
PACKED = [
    b"\x90", b"\x80", b"\xc0", b"\xc1", b"\xc4\x00", b"\xc7\x00\xff", b"\xd6\xff\0\0\0\0", b"\xdd\xff\xff\xff\xff",
    b"\xdf\x00\x0f\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\x91" * 600,
    b"\xdd\x00\x00\x80\x00" * 600, b"\x81\xa1a" * 600, b"\xcb\x7f\xf8" + b"\0" * 6, b"\xdc\x00\x41",
    b"\xa3\xed\xa0\x80",
]  # fmt: skip


# -- bytes ----------------------------------------------------------------------------------------------------


def raw(tokens: Sequence[bytes]) -> Mutate:
    """Flips, drops, repeats, and tokens of the format put anywhere."""

    def mutate(data: bytes, dice: Random) -> bytes:
        changed = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            if dice.random() < 0.3:
                at = dice.randint(0, len(changed))
                changed[at : at + dice.choice((0, 0, 1, 4))] = dice.choice(tokens)
            else:
                change(changed, dice)
        return bytes(changed)

    return mutate


def splice(one: bytes, other: bytes, dice: Random) -> bytes:
    """The beginning of one and the end of another."""
    return one[: dice.randint(0, len(one))] + other[dice.randint(0, len(other)) :]


# -- trees of values ------------------------------------------------------------------------------------------


def hostile(dice: Random, *, deepest: int = 900) -> Any:
    """A value that somebody did not expect."""
    match dice.randrange(10):
        case 0 | 1 | 2 | 3:
            return dice.choice(NUMBERS)
        case 4 | 5:
            return dice.choice(TEXTS)
        case 6:
            return dice.choice([None, True, False, b"", b"x", {}, [], [0] * 65, {"a": 1}])
        case 7:
            return dice.randint(-(1 << 66), 1 << 66) >> dice.randrange(64)
        case 8:
            return dice.choice([NINES, -NINES, NINES // 10])
        case _:
            value: Any = 1
            for _ in range(dice.choice((3, 40, deepest))):
                value = [value] if dice.random() < 0.9 else {"a": value}
            return value


def change_tree(value: Any, dice: Random) -> Any:
    """One change somewhere in maps and lists: another value, one less, one more, one twice, two swapped."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        return _change_map(dict(value), dice)
    if isinstance(value, list | tuple) and value and dice.random() < 0.8:
        return _change_list(list(value), dice)
    if isinstance(value, str) and dice.random() < 0.4:
        return dice.choice(TEXTS) if dice.random() < 0.7 else value[: dice.randint(0, len(value))]
    if type(value) in (int, float) and dice.random() < 0.6:
        return value + dice.choice((-1, 1, 8, -8)) if dice.random() < 0.7 else -value
    return hostile(dice)


def _change_map(value: dict[Any, Any], dice: Random) -> dict[Any, Any]:
    key = dice.choice(list(value))
    match dice.randrange(16):
        case 0:
            del value[key]
        case 1:
            value[dice.choice(TEXTS)] = value[key]
        case 2:
            value[dice.choice(TEXTS)] = hostile(dice)
        case 3:
            value[dice.choice(list(value))] = value[key]
        case _:
            value[key] = change_tree(value[key], dice)
    return value


def _change_list(value: list[Any], dice: Random) -> list[Any]:
    at = dice.randrange(len(value))
    match dice.randrange(7):
        case 0:
            del value[at]
        case 6:
            value = [hostile(dice)] * len(value)
        case 1:
            value.insert(at, value[dice.randrange(len(value))])
        case 2:
            value.insert(at, hostile(dice))
        case 3:
            value = (value * dice.choice((2, 9, 70)))[:MOST_ITEMS]
        case _:
            value[at] = change_tree(value[at], dice)
    return value


# -- formats --------------------------------------------------------------------------------------------------


def either(*ways: Mutate) -> Mutate:
    return lambda data, dice: dice.choice(ways)(data, dice)


def frame(data: bytes, dice: Random) -> bytes:
    """A frame whose header says something else and whose length field is right all the same."""
    length = int.from_bytes(data[4:8], "little")
    header, payload = data[8 : 8 + length], data[8 + length :]
    header = raw(PACKED)(header, dice) if dice.random() < 0.3 else _packed(header, dice)
    if dice.random() < 0.1:
        payload = raw(TOKENS)(payload, dice)
    return b"FLF\x01" + len(header).to_bytes(4, "little") + header + payload


def _packed(header: bytes, dice: Random) -> bytes:
    if len(header) > LARGE_HEADER_BYTES:
        return raw(PACKED)(header, dice)
    try:
        fields = msgpack.unpackb(header, strict_map_key=False, unicode_errors="surrogatepass")
        for _ in range(dice.choice((1, 1, 2, 3))):
            fields = change_tree(fields, dice)
        changed: bytes = msgpack.packb(fields, unicode_errors="surrogatepass")
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return raw(PACKED)(header, dice)
    if isinstance(fields, dict) and 0 < len(fields) < 15 and dice.random() < 0.1:  # a key twice
        pair = b"".join(map(msgpack.packb, dice.choice([("kind", "join"), ("task", 1), ("participant", "p01")])))
        changed = bytes([changed[0] + 1]) + changed[1:] + pair
    return changed


def as_json(data: bytes, dice: Random) -> bytes:
    """JSON with other values, a name twice, or another encoding."""
    try:
        tree = json.loads(data)
        for _ in range(dice.choice((1, 1, 2, 3))):
            tree = change_tree(tree, dice)
        text = json.dumps(tree, ensure_ascii=dice.random() < 0.5)
    except (ValueError, TypeError, RecursionError):
        return raw(TOKENS)(data, dice)
    if dice.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    encoding = dice.choice(["utf-8"] * 20 + ["utf-16", "utf-32", "utf-8-sig"])
    return text.encode(encoding, errors="surrogatepass")


def safetensors(data: bytes, dice: Random) -> bytes:
    """A manifest that says something else, its length right; or other values behind it."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    match dice.randrange(6):
        case 0:
            header = raw(TOKENS)(header, dice)
        case 1 if values:
            at = dice.randrange(len(values))
            values = values[:at] + dice.randbytes(min(8, len(values) - at)) + values[at + 8 :]
        case _:
            header = as_json(header, dice)
    return len(header).to_bytes(8, "little") + header + values


# -- several in one -------------------------------------------------------------------------------------------


def pack(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def unpack(data: bytes, most: int = 40) -> list[bytes]:
    """The parts, however damaged: the last one is what is left."""
    parts = []
    while data and len(parts) < most:
        end = 4 + int.from_bytes(data[:4], "little")
        parts.append(data[4:end])
        data = data[end:]
    return parts


def each_part(*ways: Mutate) -> Mutate:
    """One part changed (the n-th in its own way), or parts dropped, repeated and swapped."""

    def mutate(data: bytes, dice: Random) -> bytes:
        parts = unpack(data)
        if not parts:
            return raw(TOKENS)(data, dice)
        at = dice.randrange(len(parts))
        match dice.randrange(10):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, parts[dice.randrange(len(parts))])
            case 2:
                other = dice.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = b""
            case _:
                parts[at] = ways[min(at, len(ways) - 1)](parts[at], dice)
        return pack(parts)

    return mutate
