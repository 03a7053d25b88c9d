"""What a worker must not forget: the newest order, and a finished update until its fate is known.

How far the update's upload has come is noted beside it: a lost note only means to send more again. So is what its
codec owes to the next one, and what is the participant's own: both are in force only once this one was counted. And
so is how far an unfinished training has come.

The run never depends on it: a worker that lost its journal is sent its task again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from broker.durable import rename_file, replace_file
from broker.errors import BadMessage, StateError
from broker.mapped import draft, read_mapped
from broker.messages import Message, TrainRound, UpdateReady
from broker.payloads import sha256_of
from broker.tensors import Buffer, in_memory
from broker.wire import decode, encode
from workers.kept import Kept
from workers.lane import Lane
from workers.progress import Progress

log = structlog.get_logger(__name__)

LONGEST_COUNT = 10  # digits
SYNCED_FROM_S = 1.0  # of training


@dataclass(slots=True)
class Held:
    """A finished update. `sent` is true once the broker confirmed it; before, its first `confirmed` chunks were."""

    update: UpdateReady
    blob: Buffer
    sent: bool = False
    confirmed: int = 0


@dataclass(frozen=True, slots=True)
class Remembered:
    """The newest order as the frame that it arrived in, and the held update; either may be missing."""

    order: bytes | None = None
    held: Held | None = None


class Journal(Protocol):
    """Every method returns once what it says is safe."""

    async def load(self) -> Remembered:
        """What was remembered; damaged parts are set aside and forgotten, with a log line."""

    def room(self, size_bytes: int) -> Buffer:
        """Where a large body is put together: on the disk, if this journal has one; an update that was written
        there is saved without a copy. For a thread. Raises StateError if there is no room."""

    async def turn(self, order: bytes | None, settles: bool | None) -> None:  # noqa: FBT001
        """Takes in what an order says: itself, if it is to be done; and what became of the held update, if that is
        forgotten now. What that owes is in force from now on if it was counted (true), and forgotten if not."""

    async def save_held(self, held: Held, owes: Kept | None = None, own: Kept | None = None) -> None:
        """`owes`: the residual that will be in force if this update is counted, `own`: what will then be the
        participant's own; None: what is in force stays."""

    async def note_upload(self, held: Held) -> None:
        """Notes that the held update is on its way, and how far; or, once it is sent or none is confirmed, that
        there is nothing to go on with."""

    async def residual(self) -> Kept | None:
        """The residual that is in force: of the last update that was counted."""

    async def drop_residual(self) -> None: ...

    async def own(self) -> Kept | None:
        """What is the participant's own, as of the last update that was counted."""

    async def drop_own(self) -> None: ...

    def save_progress(self, progress: Progress) -> bool:
        """Keeps it in place of any before, until an update is saved; false if such a journal keeps none. Called in
        the thread that trains. Raises StateError, or BadMessage for arrays that cannot be kept."""

    async def progress(self) -> Progress | None: ...

    async def drop_progress(self) -> None: ...


class MemoryJournal:
    """Lives as long as this object: for simulations, where participants share one process."""

    def __init__(self) -> None:
        self._remembered = Remembered()
        self._owed: Kept | None = None
        self._own: Kept | None = None
        self._next: tuple[Kept | None, Kept | None] = (None, None)  # of the held update

    async def load(self) -> Remembered:
        return self._remembered

    def room(self, size_bytes: int) -> Buffer:
        return in_memory(size_bytes)

    async def turn(self, order: bytes | None, settles: bool | None) -> None:  # noqa: FBT001
        before = self._remembered
        self._remembered = Remembered(order or before.order, before.held if settles is None else None)
        if settles:
            owed, own = self._next
            self._owed, self._own = owed or self._owed, own or self._own
        if settles is not None:
            self._next = (None, None)

    async def save_held(self, held: Held, owes: Kept | None = None, own: Kept | None = None) -> None:
        self._remembered, self._next = Remembered(self._remembered.order, held), (owes, own)

    async def note_upload(self, held: Held) -> None:
        """It remembers the update as the object that it is, and that knows."""

    async def residual(self) -> Kept | None:
        return self._owed

    async def drop_residual(self) -> None:
        self._owed = None

    async def own(self) -> Kept | None:
        return self._own

    async def drop_own(self) -> None:
        self._own = None

    def save_progress(self, progress: Progress) -> bool:  # noqa: ARG002 - gone with the process that trains
        return False

    async def progress(self) -> Progress | None:
        return None

    async def drop_progress(self) -> None: ...


class Slot:
    """A file of what is in force, and one of what will be if the held update is counted. Called in one thread."""

    def __init__(self, directory: Path, name: str, suffix: str) -> None:
        self._now = directory / f"{name}.{suffix}"
        self._next = directory / f"{name}.next"  # of the held update
        self.may_hold = True  # false once it is known that nothing is in force

    def propose(self, kept: Kept | None, *, synced: bool = True) -> None:
        """None: what is in force stays."""
        if kept is None:
            _remove(self._next)
        else:
            _replace(self._next, kept.to_bytes(), synced=synced)

    def accept(self) -> None:
        self.may_hold = True
        _rename(self._next, self._now)

    def read(self) -> Kept | None:
        """What is in force; damaged, it is set aside."""
        content = _read(self._now)
        self.may_hold = content is not None
        try:
            return None if content is None else Kept.from_bytes(content)
        except BadMessage as bad:
            _set_aside(self._now, bad.reason)
            return None

    def drop(self) -> None:
        self.may_hold = False
        _remove(self._now)


class FileJournal:
    """Files in a directory of this participant alone, each replaced as a whole.

    Synced is what took long: an update that was trained in less than a second, and an order, cost less to have
    again than to sync. Journals of one process may share a lane.
    """

    def __init__(self, directory: Path, lane: Lane | None = None) -> None:
        self._lane = lane or Lane("journal")
        self._order = directory / "order.frame"
        self._update = directory / "update.frame"
        self._body = directory / "update.safetensors"
        self._upload = directory / "upload.note"
        self._owed = Slot(directory, "residual", "owed")
        self._own = Slot(directory, "own", "kept")
        self._progress = directory / "progress.saved"
        self._may_have_progress = True  # false once it is known that there is none

    async def load(self) -> Remembered:
        return await self._lane.run(self._load)

    def room(self, size_bytes: int) -> Buffer:
        return draft(self._body.parent, size_bytes)

    async def turn(self, order: bytes | None, settles: bool | None) -> None:  # noqa: FBT001
        if order is not None or settles is not None:
            await self._lane.run(partial(self._turn, order, settles))

    async def save_held(self, held: Held, owes: Kept | None = None, own: Kept | None = None) -> None:
        await self._lane.run(partial(self._save_held, held, owes, own))

    async def note_upload(self, held: Held) -> None:
        await self._lane.run(partial(self._note_upload, held))

    async def residual(self) -> Kept | None:
        return await self._lane.run(self._owed.read) if self._owed.may_hold else None

    async def drop_residual(self) -> None:
        await self._lane.run(self._owed.drop)

    async def own(self) -> Kept | None:
        return await self._lane.run(self._own.read) if self._own.may_hold else None

    async def drop_own(self) -> None:
        await self._lane.run(self._own.drop)

    def save_progress(self, progress: Progress) -> bool:
        self._may_have_progress = True
        _replace(self._progress, progress.to_pieces())
        return True

    async def progress(self) -> Progress | None:
        return await self._lane.run(self._read_progress) if self._may_have_progress else None

    async def drop_progress(self) -> None:
        await self._lane.run(self._drop_progress)

    def _read_progress(self) -> Progress | None:
        content = _read(self._progress)
        self._may_have_progress = content is not None
        try:
            return None if content is None else Progress.from_bytes(content)
        except BadMessage as bad:
            _set_aside(self._progress, bad.reason)
            return None

    def _drop_progress(self) -> None:
        if self._may_have_progress:
            _remove(self._progress)
            self._may_have_progress = False

    def _turn(self, order: bytes | None, settles: bool | None) -> None:  # noqa: FBT001
        if order is not None:
            _replace(self._order, order, synced=False)
        if settles is not None:
            self._settle_held(settles)

    def _note_upload(self, held: Held) -> None:
        if held.confirmed and not held.sent:
            _replace(self._upload, _note(held, held.confirmed))
        else:
            _remove(self._upload)

    def _drop_held(self) -> None:
        _remove(self._upload)  # never a note about another update's chunks
        _remove(self._update)

    def _save_held(self, held: Held, owes: Kept | None, own: Kept | None) -> None:
        self._drop_held()  # never a header that names another update's body, or stands beside what another keeps
        synced, inline = held.update.seconds >= SYNCED_FROM_S, _is_inline(held.update)
        if not inline:
            _replace(self._body, held.blob, synced=synced)
        self._owed.propose(owes, synced=synced)
        self._own.propose(own, synced=synced)
        _replace(self._update, encode(held.update, held.blob if inline else b""), synced=synced)
        self._drop_progress()

    def _settle_held(self, counted: bool) -> None:  # noqa: FBT001
        if counted:  # first: whoever is killed now is told again that it was counted
            self._owed.accept()
            self._own.accept()
        self._drop_held()
        self._owed.propose(None)
        self._own.propose(None)

    def _load(self) -> Remembered:
        order = _frame(self._order, TrainRound)
        update = _frame(self._update, UpdateReady)
        if update is None:
            return Remembered(order and order[1])
        message, frame = update
        blob = decode(frame)[1] if _is_inline(message) else _mapped(self._body)
        body = message.body if isinstance(message, UpdateReady) else None
        if isinstance(message, UpdateReady) and (body is None or sha256_of(blob) == body.sha256):
            held = Held(message, blob)
            held.confirmed = self._confirmed(held)
            held.sent = not held.confirmed  # perhaps: the aggregator will say `missing` if not
            return Remembered(order and order[1], held)
        _set_aside(self._update, "its body does not match its sha256")
        return Remembered(order and order[1])

    def _confirmed(self, held: Held) -> int:
        """What the note says; 0 if there is none, or it is damaged or about another update."""
        note = _read(self._upload) or b""
        count, chunks = note.partition(b" ")[0], held.update.body.chunks if held.update.body else 0
        confirmed = int(count) if count.isdigit() and len(count) < LONGEST_COUNT else 0
        return confirmed if confirmed <= chunks and note == _note(held, confirmed) else 0


def _is_inline(message: Message) -> bool:
    return isinstance(message, UpdateReady) and message.body is not None and message.body.where == "inline"


def _note(held: Held, confirmed: int) -> bytes:
    """How many chunks of which update, and a checksum of that."""
    said = f"{confirmed} {held.update.run_id} {held.update.task} {held.update.body and held.update.body.sha256}"
    return f"{said} {zlib.crc32(said.encode()):08x}".encode()


def _frame(path: Path, kind: type[Message]) -> tuple[Message, bytes] | None:
    frame = _read(path)
    if frame is None:
        return None
    try:
        message, _ = decode(frame)
    except BadMessage as bad:
        _set_aside(path, bad.reason)
        return None
    if not isinstance(message, kind):
        _set_aside(path, f"it holds a {message.kind} message")
        return None
    return message, frame


def _read(path: Path) -> bytes | None:
    with _reading(path):
        return path.read_bytes()
    return None


def _mapped(path: Path) -> memoryview:
    with _reading(path):
        return read_mapped(path)
    return memoryview(b"")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Passes over a file that is not there."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StateError(
            f"{path}: the journal cannot be read ({error}): check the disk and its permissions"
        ) from error


def _set_aside(path: Path, why: str) -> None:
    with _writing(path):
        path.replace(path.with_suffix(".damaged"))
    log.error("journal_damaged", file=str(path), reason=why, moved_to=str(path.with_suffix(".damaged")))


def _remove(path: Path) -> None:
    with _writing(path):
        path.unlink(missing_ok=True)


def _rename(path: Path, to: Path) -> None:
    """Unless there is none."""
    with _writing(path), suppress(FileNotFoundError):
        rename_file(path, to)


def _replace(path: Path, content: Buffer | Sequence[Buffer], *, synced: bool = True) -> None:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content, path.with_suffix(".new"), synced=synced)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path}: the journal cannot be written ({error}): free space or check permissions"
        ) from error
