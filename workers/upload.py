"""How far a large update has come, so that a cut or a restart costs only what was not confirmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.journal import Held, Journal
from workers.task import WorkAbandoned

NOTE_CHUNKS = 8  # are confirmed (or one part, in a store), or
NOTE_S = 2.0  # passed, before the progress of an upload is noted again


@dataclass(slots=True)
class Upload:
    """How far the chunks of a held update have come. It goes on after a cut, and is noted for after a restart.

    A note costs two syncs of a disk, so it is written now and then only; what came after it is sent again.
    """

    held: Held
    journal: Journal
    clock: Callable[[], float]
    is_wanted: Callable[[], bool]
    on_resumed: Callable[[], object]
    noted: int = -NOTE_CHUNKS  # the first that arrive are noted at once
    noted_at: float = 0.0

    async def arrived(self, count: int) -> None:
        """The first `count` chunks are confirmed. Raises WorkAbandoned if the update cannot count any more."""
        if not self.is_wanted():
            raise WorkAbandoned("the update's fate is known")
        if self.noted < 0 and self.held.confirmed:
            self.on_resumed()
        self.held.confirmed = count
        body = self.held.update.body
        enough = 1 if body is not None and body.where == "url" else NOTE_CHUNKS
        if count - self.noted >= enough or self.clock() - self.noted_at >= NOTE_S:
            self.noted, self.noted_at = count, self.clock()
            await self.journal.note_upload(self.held)
