"""Bytes as somebody might damage or forge them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def mutations(valid: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Random changes of a valid message: flipped, inserted, dropped, repeated, replaced by numbers, cut off."""
    dice = Random(seed)
    for _ in range(count):
        changed = bytearray(valid)
        for _ in range(dice.randint(1, 4)):
            change(changed, dice)
        yield bytes(changed)


def change(changed: bytearray, dice: Random) -> None:
    at = dice.randint(0, len(changed))
    until = min(len(changed), at + dice.randint(1, 12))
    match dice.choice(["flip", "flip", "insert", "drop", "repeat", "digits", "cut"]):
        case "flip" if at < len(changed):
            changed[at] ^= dice.randint(1, 255)
        case "insert":
            changed[at:at] = dice.randbytes(dice.randint(1, 8))
        case "drop":
            del changed[at:until]
        case "repeat":
            changed[at:at] = changed[at:until]
        case "digits":
            changed[at:until] = b"%d" % dice.randint(-(1 << 70), 1 << 70)
        case "cut" if dice.random() < 0.1:
            del changed[at:]
