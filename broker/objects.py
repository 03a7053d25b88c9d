"""Files by path under one root, whole or not there: a shared folder, or whatever fsspec reaches.

Nothing here knows what the files are. Methods block; whatever goes wrong is an exception of the file system's own,
except that a file which is not there is FileNotFoundError everywhere.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from broker.errors import ConfigError

FOLDERS = ("", "file", "local")
WEB = ("http", "https")
TESTED = (*FOLDERS, *WEB, "s3", "memory")


class Objects(Protocol):
    """What a claim-check store needs of a file system. Paths are relative, as `a/b/c`."""

    keeps: bool  # whether it can list and delete: who collects garbage needs that

    def write(self, path: str, data: memoryview) -> None:
        """Makes or replaces a file: whoever reads meanwhile gets the old bytes or the new ones."""

    def read(self, path: str, into: memoryview) -> int:
        """Fills `into` and returns how long the file is, or seems: a longer one counts as one byte more."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder, which may be absent: files and folders, by their last name."""

    def delete(self, folder: str) -> None:
        """Deletes a folder and all that is in it; it may be absent."""


def open_objects(url: str) -> Objects:
    """The file system that a URL or a path names. Credentials come from the environment or fsspec's own settings.

    Raises ConfigError.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    if protocol not in TESTED or not (protocol or url.startswith("/")):
        raise ConfigError(f"store {url!r}: use file:///FOLDER, s3://BUCKET/PREFIX or http[s]://HOST/PATH")
    if protocol in FOLDERS:
        return Folder(Path(url.removeprefix(f"{protocol}://") if protocol else url))
    import fsspec  # takes its time

    options: dict[str, Any] = {} if protocol in (*WEB, "memory") else {"use_listings_cache": False}
    try:
        files, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"store {url!r}: {error}: pip install 'fluffle[s3]'") from None
    return Web(files, root) if protocol in WEB else Remote(files, root)


class Remote:
    """What fsspec reaches, if a put there is atomic, as in object stores."""

    keeps = True

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root.rstrip("/")

    def write(self, path: str, data: memoryview) -> None:
        self._files.pipe_file(self._at(path), bytes(data))

    def read(self, path: str, into: memoryview) -> int:
        found: bytes = self._files.cat_file(self._at(path), start=0, end=len(into) + 1)
        if len(found) == len(into):
            into[:] = found
        return min(len(found), len(into) + 1)

    def names(self, folder: str) -> list[str]:
        here = self._at(folder)
        with suppress(FileNotFoundError):
            found = (path.strip("/") for path in self._files.ls(here, detail=False))
            return [_split(path)[1] for path in found if path != here.strip("/")]
        return []

    def delete(self, folder: str) -> None:
        """What an object store refuses to delete is not told by fsspec: it is still there."""
        if found := self._below(folder):
            self._files.rm(found)
            if left := self._below(folder):
                raise PermissionError(f"{left[0]} could not be deleted")

    def _below(self, folder: str) -> list[str]:
        """All files in it; the folder itself is one for some object stores."""
        here = self._at(folder)
        return [path for path in self._files.find(here) if path.strip("/").startswith(here.strip("/") + "/")]

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


class Web(Remote):
    """A web server: GET, with ranges if it knows them, and PUT if it takes it. It can neither list nor delete."""

    keeps = False

    def read(self, path: str, into: memoryview) -> int:
        """As elsewhere, but its length is asked for first: a server may send all of it, whatever the range."""
        size = None
        with suppress(FileNotFoundError):  # or the server cannot be reached, or does not tell: reading it will say
            size = self._files.info(self._at(path)).get("size")
        if size is not None and size != len(into):
            return min(int(size), len(into) + 1)
        return super().read(path, into)

    def names(self, folder: str) -> list[str]:
        raise NotImplementedError("a web server does not tell what it has")

    def delete(self, folder: str) -> None:
        raise NotImplementedError("nothing is deleted over HTTP")


class Folder:
    """A folder, perhaps on a share, in which others may write too: no symbolic link below the root is followed.

    Who may do what is decided by the rights of folders that are there before: new ones get those of the folder that
    they are made in. Nothing is synced: what a power loss takes is missing, and is sent again.
    """

    keeps = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def write(self, path: str, data: memoryview) -> None:
        above, name = _split(path)
        with self._opened(above, make=True) as folder:
            beside = f".{name}.{secrets.token_hex(4)}.new"
            try:
                with open(beside, "xb", buffering=0, opener=_inside(folder)) as file:
                    with suppress(PermissionError):  # shares without Unix rights
                        os.fchmod(file.fileno(), os.fstat(folder).st_mode & 0o666)
                    _write_all(file.fileno(), data)
                os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=folder)
                raise

    def read(self, path: str, into: memoryview) -> int:
        above, name = _split(path)
        with self._opened(above) as folder, open(name, "rb", buffering=0, opener=_inside(folder)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{path} is no file")
            if found.st_size != len(into):
                return min(found.st_size, len(into) + 1)
            done = 0
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
            return done

    def names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError), self._opened(folder) as here:
            return os.listdir(here)
        return []

    def delete(self, folder: str) -> None:
        """What lies in it may be a link that somebody put there: the link goes, not what it names."""
        above, name = _split(folder)
        with suppress(FileNotFoundError), self._opened(above) as parent:
            if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)

    @contextmanager
    def _opened(self, folder: str, *, make: bool = False) -> Iterator[int]:
        """The folder's descriptor, reached step by step, so that nobody can lead us elsewhere meanwhile."""
        try:
            here = os.open(self.root, _FOLDER)
        except OSError as error:
            raise NotADirectoryError(
                f"{self.root} is no folder that can be used: is it mounted? ({error})"
            ) from None
        try:
            for name in PurePosixPath(folder).parts:
                if make:
                    _make(name, here)
                below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _split(path: str) -> tuple[str, str]:
    above, _, name = path.rpartition("/")
    return above, name


def _inside(folder: int) -> Any:
    """Opens names in that folder only; what is no file (a pipe, say) does not make us wait."""
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)


def _make(name: str, above: int) -> None:
    try:
        os.mkdir(name, dir_fd=above)
    except FileExistsError:
        return
    wanted = os.fstat(above).st_mode & 0o2777
    if os.stat(name, dir_fd=above).st_mode & 0o2777 != wanted:  # who is not in its group would lose setgid by it
        with suppress(PermissionError):
            os.chmod(name, wanted, dir_fd=above)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
