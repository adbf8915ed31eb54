"""TCP ports of this host: which are free, and whose sockets listen on one."""

from __future__ import annotations

import contextlib
import os
import socket

from eval_runner import supervisor

_LISTENS = "0A"
"""A socket's state in /proc/net/tcp."""


def free(count: int) -> tuple[int, ...]:
    """Ports that no socket of this host is bound to, on any of its addresses, at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return tuple(one.getsockname()[1] for one in sockets)


def listening(port: int) -> set[str]:
    """The sockets, by inode, that listen on `port` on any address of this host (its network namespace)."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as lines:
            for fields in map(str.split, lines):
                if fields[3] == _LISTENS and fields[1].endswith(f":{port:04X}"):
                    found.add(fields[9])
    return found


def owned(root: int, inodes: set[str]) -> set[str]:
    """Those of the sockets `inodes` that the process `root`, or one below it, holds."""
    links = {f"socket:[{inode}]": inode for inode in inodes}
    found = set()
    for pid in (root, *supervisor.descendants(root)):
        with contextlib.suppress(OSError):      # it may end
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(links.get(os.readlink(f"/proc/{pid}/fd/{fd}"), ""))
    return found - {""}
