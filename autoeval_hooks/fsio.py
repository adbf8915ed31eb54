"""File operations that survive crashes and shared file systems.

`FileOps` is every call into the file system that the queue makes, one method each, so that a test
can put a fault before and after each of them. The functions below it are the durable idioms.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import uuid

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV}
"""What `link` answers where it cannot be done, as against where it went wrong."""


FICLONE = 0x40049409
"""ioctl of linux/fs.h: share the extents of another file."""


class ForeignFile(PermissionError):
    """A file of a user whom the directory's mode does not let write there."""


class FileOps:
    """The operating system's calls, unchanged. Subclass it to inject faults."""

    def create(self, path: str) -> int:
        """A file descriptor for a new file, open for reading and writing; FileExistsError if it is there."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o664)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def nlink(self, path: str) -> int:
        """Number of names of a file, read through an open so that no attribute cache answers."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.fstat(fd).st_nlink
        finally:
            os.close(fd)

    def stands_at(self, fd: int, path: str) -> bool:
        """Whether an open file has the name `path`. Its number of names does not tell: where it was removed through
        the same NFS mount, the client keeps it as `.nfs…` for as long as it is open."""
        try:
            there = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        try:
            return os.path.samestat(os.fstat(there), os.fstat(fd))
        finally:
            os.close(there)

    def link(self, src: str, dst: str) -> None:
        os.link(src, dst, follow_symlinks=False)

    def reflink(self, src: str, dst: str) -> None:
        """`dst`, a new file with the content of `src`, which shares its blocks until either is written to."""
        with open(src, "rb") as reader, open(dst, "xb") as writer:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        shutil.copystat(src, dst)

    def copy(self, src: str, dst: str) -> None:
        """`dst`, a new and durable file with the content and the times of `src`."""
        with open(src, "rb") as reader, open(dst, "xb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
        shutil.copystat(src, dst)

    def rename(self, src: str, dst: str) -> None:
        os.rename(src, dst)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o775)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def read(self, path: str, limit: int, owners: frozenset[int] | None = None) -> bytes:
        """At most `limit` + 1 bytes of a regular file; a link is not followed, a pipe is not waited for.

        Raises ForeignFile for a file of a user (uid) that is none of `owners`, where these are given.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            owner = os.fstat(fd).st_uid
            if owners is not None and owner not in owners:
                raise ForeignFile(errno.EPERM, f"belongs to user {owner}", path)
            return file.read(limit + 1)

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_new(ops: FileOps, path: str, data: bytes) -> None:
    """Create `path` with `data`, durable but for its name. What was begun is removed on failure."""
    fd = ops.create(path)
    try:
        view = memoryview(data)
        while view:
            view = view[ops.write(fd, bytes(view)) :]
        ops.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            ops.unlink(path)
        raise
    finally:
        ops.close(fd)


def replace(path: str, data: bytes, ops: FileOps | None = None) -> None:
    """Atomically replace the file `path`: readers see the old content or the new, also after a power cut."""
    ops = ops or FileOps()
    directory = os.path.dirname(path)
    tmp = os.path.join(directory, f".{os.path.basename(path)}.{unique()}")
    write_new(ops, tmp, data)
    try:
        ops.rename(tmp, path)
    except FileNotFoundError:       # done, and the reply was lost: nobody else knows the passing name
        if os.path.basename(tmp) in ops.listdir(directory):
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            ops.unlink(tmp)
        raise
    ops.sync_dir(directory)


def moved(ops: FileOps, src: str, dst: str) -> bool:
    """Rename `src` to `dst`, a name that is used once; True iff the file now stands there by us.

    An NFS server may do a rename and lose its reply; the client asks again and reports ENOENT. The
    destination is then looked up in a listing, which lags far less than a cached negative lookup.
    """
    try:
        ops.rename(src, dst)
    except FileNotFoundError:
        return os.path.basename(dst) in ops.listdir(os.path.dirname(dst))
    return True


def make_dirs(ops: FileOps, path: str) -> None:
    """Make the directory `path` and those above it that are missing. One that is there is as good."""
    if not os.path.isdir(path):
        make_dirs(ops, os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            ops.mkdir(path)


def remove(ops: FileOps, path: str) -> None:
    """Remove the file `path`. One that is gone is as good: a server that lost its reply says so too."""
    with contextlib.suppress(FileNotFoundError):
        ops.unlink(path)


def remove_flat(ops: FileOps, path: str) -> None:
    """Remove the directory `path` and the files in it; nothing below a directory in it. One that is gone is as good."""
    with contextlib.suppress(FileNotFoundError):
        for name in ops.listdir(path):
            remove(ops, os.path.join(path, name))
        ops.rmdir(path)


def hostname() -> str:
    """This host's name, safe in file names."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"


def unique() -> str:
    """A name that no other process, host or call has: `host-pid-random`, safe in file names."""
    return f"{hostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def gate(path: str) -> int:
    """A directory's change time in ns through an open descriptor: on NFS, `os.stat` of it lags by half a minute."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)
