"""Targets that read files which a crash, a disk or a person may have damaged."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import History, RoundReport
from broker import wire
from broker.errors import ConfigError, StateError
from broker.messages import TrainRound, UpdateReady
from fluffle.config import from_values, load_config
from fluffle.layers import to_toml
from fluffle.rundir import RunDir
from fluffle.secrets import read_secrets
from fluffle.shards import load_model
from tests.fuzzing import mutate
from tests.fuzzing.decoders import BLOBS, EXAMPLES, FRAMES, HEAD, UPDATE
from tests.fuzzing.engine import Target
from workers.journal import FileJournal, Held

FILE_SPARE_BYTES = 2 << 20
OWN_SPARE_BYTES = 64 << 20  # what somebody writes into a file of their own costs nobody else
BODY = BLOBS[0]
DIGEST = hashlib.sha256(BODY).hexdigest()
BODY_AT = UPDATE.body.model_copy(update={"sha256": DIGEST, "size_bytes": len(BODY)}) if UPDATE.body else None
ORDER = FRAMES[[example.kind for example in EXAMPLES].index("round")]


def _anew(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _gone(directory: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(directory, ignore_errors=True)


# -- the worker's journal -------------------------------------------------------------------------------------


def journal(directory: Path) -> Target:
    """Three files: what is damaged is set aside, and the second look finds the same as the first."""

    def check(data: bytes) -> None:
        place = _anew(directory)
        names = ("order.frame", "update.frame", "update.safetensors")
        for name, part in zip(names, mutate.unpack(data), strict=False):
            (place / name).write_bytes(part)
        remembered = FileJournal(place)._load()
        if remembered.order is not None:
            assert isinstance(wire.decode(remembered.order)[0], TrainRound)
        if remembered.held is not None:
            _check_held(remembered.held)
        assert FileJournal(place)._load() == remembered

    update = UPDATE.model_copy(update={"body": BODY_AT})
    seed = mutate.pack([ORDER, wire.encode(update), BODY])
    bare = mutate.pack([ORDER, FRAMES[4], b""])
    ways = mutate.each_part(mutate.frame, mutate.frame, mutate.safetensors)
    return Target(check, (seed, bare), ways, (), spare_bytes=FILE_SPARE_BYTES, close=_gone(directory))


def _check_held(held: Held) -> None:
    assert isinstance(held.update, UpdateReady)
    if held.update.body is not None:
        assert hashlib.sha256(held.blob).hexdigest() == held.update.body.sha256


# -- the aggregator's checkpoints and history -----------------------------------------------------------------


def checkpoints(directory: Path) -> Target:
    """A manifest, and a model under its digest: the newest whole one is found, or none."""
    record = HEAD.model_copy(update={"model": BODY_AT, "state": None})

    def check(data: bytes) -> None:
        manifest, model, *older = [*mutate.unpack(data), b"", b""][:4]
        stored = Checkpoints(_anew(directory))
        (directory / "v000001.json").write_bytes(manifest)
        if older:
            (directory / "v000000.json").write_bytes(older[0])
        stored.path(DIGEST).write_bytes(model)
        found = stored.newest()
        if found is not None:
            assert found.model is not None
            assert hashlib.sha256(stored.load(found.model.sha256) or b"").hexdigest() == found.model.sha256
            assert wire.decode(wire.encode(found))[0] == found
        stored.describe(record)
        stored.prune()

    stored = Checkpoints(_anew(directory))
    stored.store(DIGEST, BODY)
    stored.describe(record)
    manifest = (directory / "v000001.json").read_bytes()
    seeds = (mutate.pack([manifest, BODY]), mutate.pack([manifest, BODY, manifest]))
    ways = mutate.each_part(mutate.as_json, mutate.safetensors, mutate.as_json)
    return Target(check, seeds, ways, (StateError,), spare_bytes=FILE_SPARE_BYTES, close=_gone(directory))


def history(directory: Path) -> Target:
    """The file that people ask afterwards."""
    path = _anew(directory) / "history.sqlite"

    def check(data: bytes) -> None:
        for left in directory.glob("history.sqlite*"):
            left.unlink()
        path.write_bytes(data)
        with History(path) as found:
            for run_id in found.runs():
                found.rounds(run_id)
                found.ledger(run_id)
                found.totals(run_id)

    with History(path) as written:
        report = RoundReport("run-1", 1, 1, 1, 1, 1, "train", 1, 2, 1, 1, 0, 0, 0.0, 1.0, 1.0, {"loss": 0.5})
        written.record(report, HEAD.decided)
    seed = path.read_bytes()
    ways = mutate.raw([b"\xff", b"\x00" * 8, b"null", b"[]", b"\xed\xa0\x80", b"\x7f\xff\xff\xff", b"{", b"-1"])
    return Target(check, (seed,), ways, (StateError,), spare_bytes=FILE_SPARE_BYTES, close=_gone(directory))


# -- what people write ----------------------------------------------------------------------------------------

GIVEN = {"task": "digits", "train.lr": 0.1, "broker.url": "amqp://u:p@[::1]:5672/%2f"}
CONFIG = to_toml(load_config(from_values(GIVEN), defaults=lambda _: {"train.lr": 0.1})).encode()
TOML = mutate.raw(mutate.TOKENS)


def config(directory: Path) -> Target:
    """A run's own settings: what is understood is written again as something that means the same."""
    run = RunDir(_anew(directory))

    def check(data: bytes) -> None:
        run.config_file.write_bytes(data)
        found = run.config()
        run.config_file.write_text(to_toml(found), "utf-8")
        assert to_toml(run.config()) == to_toml(found)

    refusals = (ConfigError, StateError)
    return Target(check, (CONFIG,), TOML, refusals, spare_bytes=OWN_SPARE_BYTES, close=_gone(directory))


def secrets(directory: Path) -> Target:
    path = _anew(directory) / "secrets.toml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(password, str) and password for password in read_secrets(path).values())

    seed = b'# Passwords.\naggregator = "secret"\np01 = "more\\u00e9"\n'
    return Target(check, (seed,), TOML, (ConfigError,), spare_bytes=OWN_SPARE_BYTES, close=_gone(directory))


def result(directory: Path) -> Target:
    """What a finished run left: its result, and its model."""
    run = RunDir(_anew(directory))

    def check(data: bytes) -> None:
        summary, model = [*mutate.unpack(data), b"", b""][:2]
        run.model_file.write_bytes(model)
        run.result_file.write_bytes(summary)
        for read in (lambda: load_model(run.model_file), run.result):
            with suppress(StateError):
                read()

    seed = mutate.pack([b'{"run": "run-1", "rounds": 3, "metrics": {"loss": 0.5}}', BODY])
    ways = mutate.each_part(mutate.as_json, mutate.safetensors)
    return Target(check, (seed,), ways, (), spare_bytes=FILE_SPARE_BYTES, close=_gone(directory))
