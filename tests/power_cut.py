"""What a power cut could undo, as far as POSIX promises nothing better."""

from __future__ import annotations

import os

from autoeval_hooks.fsio import FileOps


class PowerCut(FileOps):
    """Knows what a power cut may undo: a name whose directory was not synced since, content that was not."""

    def __init__(self) -> None:
        self.names_at_risk: list[str] = []
        self.content_at_risk: set[str] = set()
        self._open: dict[int, str] = {}

    def create(self, path: str) -> int:
        fd = super().create(path)
        self._open[fd] = path
        self.names_at_risk.append(path)
        return fd

    def write(self, fd: int, data: bytes) -> int:
        self.content_at_risk.add(self._open[fd])
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self.content_at_risk.discard(self._open[fd])

    def link(self, src: str, dst: str) -> None:
        assert self.content_at_risk == set(), "named before its content was safe"
        super().link(src, dst)
        self.names_at_risk.append(dst)

    def rename(self, src: str, dst: str) -> None:
        assert self.content_at_risk == set(), "named before its content was safe"
        assert not [p for p in self.names_at_risk if os.path.dirname(p) == src], "named before what is in it was safe"
        super().rename(src, dst)
        self.names_at_risk = [p for p in self.names_at_risk if p != src] + [dst]

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self.names_at_risk.append(path)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.names_at_risk = [p for p in self.names_at_risk if p != path]

    def sync_dir(self, path: str) -> None:
        self.names_at_risk = [p for p in self.names_at_risk if os.path.dirname(p) != path]
