"""A shared folder in which somebody else may write, too: nobody is led out of it, and nothing waits for ever."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.errors import ConfigError
from broker.objects import Folder, Web, open_objects

DATA = memoryview(b"some bytes")


def read(folder: Folder, path: str, size: int = len(DATA)) -> tuple[int, bytes]:
    buffer = bytearray(size)
    return folder.read(path, memoryview(buffer)), bytes(buffer)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "00000").write_bytes(b"other peopl")
    return tmp_path / "root"


def test_a_link_in_place_of_a_part_is_not_followed(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "00000").symlink_to(root.parent / "outside" / "00000")
    with pytest.raises(OSError, match="symbolic link"):
        read(Folder(root), "a/00000")


def test_a_link_in_place_of_a_folder_is_not_followed(root: Path) -> None:
    (root / "a").symlink_to(root.parent / "outside")
    folder = Folder(root)
    with pytest.raises(NotADirectoryError):
        read(folder, "a/00000")
    with pytest.raises(NotADirectoryError):
        folder.write("a/00001", DATA)
    with pytest.raises(NotADirectoryError):
        folder.names("a")
    assert os.listdir(root.parent / "outside") == ["00000"]


@pytest.mark.parametrize("deeper", [False, True])
def test_deleting_takes_the_link_and_not_what_it_names(root: Path, *, deeper: bool) -> None:
    (root / "a").mkdir()
    (root / "a" / "b").symlink_to(root.parent / "outside")
    Folder(root).delete("a" if deeper else "a/b")
    assert not (root / "a" / "b").is_symlink()
    assert (root.parent / "outside" / "00000").exists()


def test_a_link_that_was_put_in_place_of_a_part_is_replaced(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "00000").symlink_to(root.parent / "outside" / "00000")
    folder = Folder(root)
    folder.write("a/00000", DATA)
    assert read(folder, "a/00000") == (len(DATA), bytes(DATA))
    assert (root.parent / "outside" / "00000").read_bytes() == b"other peopl"


def test_a_pipe_is_refused_at_once(root: Path) -> None:
    (root / "a").mkdir()
    os.mkfifo(root / "a" / "00000")
    with pytest.raises(OSError, match="is no file"):
        read(Folder(root), "a/00000")


def test_a_folder_in_place_of_a_part_is_refused(root: Path) -> None:
    (root / "a" / "00000").mkdir(parents=True)
    with pytest.raises(OSError, match=r"is no file|Is a directory"):
        read(Folder(root), "a/00000")


def test_nothing_is_read_of_a_file_of_another_length(root: Path) -> None:
    (root / "a").mkdir()
    with (root / "a" / "00000").open("wb") as file:
        file.truncate(1 << 40)
    assert read(Folder(root), "a/00000") == (len(DATA) + 1, bytes(len(DATA)))


def test_a_root_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """It may be a share that is not mounted: nothing may be written under it meanwhile."""
    folder = Folder(tmp_path / "share")
    for work in (lambda: folder.write("a/b", DATA), lambda: folder.names("a"), lambda: read(folder, "a/b")):
        with pytest.raises(NotADirectoryError, match="is it mounted"):
            work()
    assert not (tmp_path / "share").exists()


def test_what_is_made_has_the_rights_of_the_folder_that_it_is_in(root: Path) -> None:
    """Whoever sets up the folders decides, not the umask of whoever writes."""
    (root / "mine").mkdir()
    (root / "mine").chmod(0o2770)
    before = os.umask(0o077)
    try:
        Folder(root).write("mine/run/00000", DATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "mine" / "run").stat().st_mode) == 0o2770
    assert stat.S_IMODE((root / "mine" / "run" / "00000").stat().st_mode) == 0o660


def test_a_write_that_fails_leaves_nothing(root: Path) -> None:
    (root / "a" / "00000").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        Folder(root).write("a/00000", DATA)
    assert os.listdir(root / "a") == ["00000"]


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """As that user, with a group of its own and no other."""
    groups, umask = os.getgroups(), os.umask(0o007)
    os.setgroups([])
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.umask(umask)
        os.setgroups(groups)


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A folder that others can reach: pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_a_participant_writes_in_its_own_folder_only(open_root: Path) -> None:
    """The folders of docs/deploy.md: p01 is user 2001, the aggregator and its group are 2000."""
    make = (("f", 2000, 0o755), ("f/models", 2000, 0o755), ("f/updates", 2000, 0o755))
    own = (("f/updates/p01", 2001, 0o2770), ("f/updates/p02", 2002, 0o2770))
    for path, owner, mode in (*make, *own):
        (open_root / path).mkdir()
        os.chown(open_root / path, owner, 2000)
        (open_root / path).chmod(mode)
    folder, update = Folder(open_root), "f/updates/p01/r/1/s/00000"
    with acting_as(2000):
        folder.write("f/models/r/m/00000", DATA)
    with acting_as(2001):
        folder.write(update, DATA)
        assert read(folder, "f/models/r/m/00000") == (len(DATA), bytes(DATA))
        for path in ("f/models/r/m/00000", "f/updates/p02/r/1/s/00000", "f/updates/p03/00000", "f/other", "g/x"):
            with pytest.raises(PermissionError):
                folder.write(path, DATA)
    with acting_as(2002), pytest.raises(PermissionError):
        read(folder, update)
    with acting_as(2000):
        assert read(folder, update) == (len(DATA), bytes(DATA))
        folder.delete("f/updates/p01/r/1")
    assert not (open_root / "f/updates/p01/r/1").exists()


@pytest.mark.parametrize(
    "url", ["gopher://x", "sftp://host/x", "s3", "relative/path", "simplecache::s3://x", "C:\\x"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="use file:///FOLDER, s3://BUCKET/PREFIX or http"):
        open_objects(url)


def test_addresses() -> None:
    assert isinstance(open_objects("/some/folder"), Folder)
    found = open_objects("file:///some/folder")
    assert isinstance(found, Folder)
    assert found.root == Path("/some/folder")
    web = open_objects("https://host/path/")
    assert isinstance(web, Web)
    assert not web.keeps


def test_an_address_that_needs_a_package_tells_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **options: object) -> object:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"pip install 'fluffle\[s3\]'"):
        open_objects("s3://bucket/prefix")
