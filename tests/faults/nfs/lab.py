"""The lab: a User-Mode Linux guest with a real kernel NFS server and clients, as a child process of ours.

No root, no NFS modules and no free port are needed on this machine: the guest (`init.sh`) is its own kernel. Its root
is this machine's file system, its export one disk image in the lab's directory. From a shell, in the repository:

    python tests/faults/nfs/lab.py missing              the packages to install, if any; none where it cannot boot
    python tests/faults/nfs/lab.py run 'df /mnt/a'      run a command in a guest
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
PACKAGES = {
    "linux.uml": "user-mode-linux", "rpc.nfsd": "nfs-kernel-server", "mount.nfs": "nfs-common", "rpcbind": "rpcbind",
    "mkfs.ext4": "e2fsprogs", "modprobe": "kmod", "ip": "iproute2", "gcc": "gcc",
}  # fmt: skip
"""Program → the Debian package that has it."""
MODULES = Path("/usr/lib/uml/modules")
MEMORY = 1 << 30
DISK = 2 << 30
"""Bytes, of which only those that are used take space."""
BOOT_S = 120.0
"""It takes 5 s on a quiet machine."""


class CannotBoot(Exception):
    """The guest does not come up on this machine; the message says why."""


class GuestFailed(Exception):
    """The guest came up, and then took longer than allowed or died."""


def missing() -> list[str]:
    """The Debian packages that are needed and not here."""
    return sorted(package for program, package in PACKAGES.items() if shutil.which(program, path=SBIN) is None)


def _fits() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def obstacle() -> str:
    """Why no guest can be started here; "" where one can be tried."""
    if not _fits():
        return f"User-Mode Linux needs Linux on x86_64; this is {sys.platform} on {platform.machine()}"
    if packages := missing():
        return f"packages are missing: apt-get install --no-install-recommends {' '.join(packages)}"
    if not list(MODULES.glob("*/modules.dep")):
        return f"{MODULES}/*/modules.dep is missing; install user-mode-linux again"
    return ""


class Lab:
    """One disk and, while `start` … `wait` or `cut`, one guest. Leaving the context ends it and removes all of it."""

    def __init__(self) -> None:
        if reason := obstacle():
            raise CannotBoot(reason)
        self.directory = Path(tempfile.mkdtemp(prefix="autoeval-lab-"))
        self._guest: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._shown = 0

    def __enter__(self) -> Lab:
        try:
            (self.directory / "modules/lib/modules").mkdir(parents=True)
            for tree in MODULES.iterdir():
                (self.directory / "modules/lib/modules" / tree.name).symlink_to(tree)
            shim = [_program("gcc"), "-O2", "-shared", "-fPIC", "-o", str(self.directory / "shim.so")]
            _prepare([*shim, str(HERE / "xstate_shim.c"), "-ldl"])
            self.new_disk()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
        shutil.rmtree(self.directory, ignore_errors=True)

    def new_disk(self) -> None:
        disk = self.directory / "disk.img"
        disk.unlink(missing_ok=True)
        with disk.open("wb") as file:
            file.truncate(DISK)
        _prepare([_program("mkfs.ext4"), "-q", "-F", "-N", "400000", str(disk)])

    def start(self, command: str) -> None:
        """Boot, and have the guest begin `command` (bash). Raises CannotBoot with the end of its console's output."""
        for name in ("up", "status", "output"):
            (self.directory / name).unlink(missing_ok=True)
        self._shown = 0
        (self.directory / "command.sh").write_text(command + "\n")
        shm = Path("/dev/shm")
        roomy = shm.is_dir() and shutil.disk_usage(shm).free > MEMORY
        env = os.environ | {
            "LD_PRELOAD": str(self.directory / "shim.so"), "TMPDIR": str(shm if roomy else self.directory),
        }  # fmt: skip
        with (self.directory / "console").open("wb") as console:
            self._guest = subprocess.Popen(
                [
                    _program("linux.uml"), f"mem={MEMORY}", f"ubd0={self.directory / 'disk.img'}", "root=/dev/root",
                    "rootfstype=hostfs", "rootflags=/", "rw", f"init={HERE / 'init.sh'}", f"LAB={self.directory}",
                    f"LAB_CWD={Path.cwd()}", "con=null", "con0=null,fd:2", "con1=fd:0,fd:1", "quiet",
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=env, start_new_session=True,
            )  # fmt: skip
        # Should this process be killed, its end of the pipe closes, and nothing of the lab stays behind.
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -KILL "-$0"; rm -rf "$1"', str(self._guest.pid), str(self.directory)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + BOOT_S
        while not (self.directory / "up").exists():
            if self._guest.poll() is not None or time.monotonic() > end:
                self.cut()
                raise CannotBoot(f"the guest did not come up; the end of its console:\n{self._console()}")
            time.sleep(0.1)

    def wait(self, seconds: float) -> int:
        """The command's exit status; its output is shown as it comes. Raises GuestFailed after so many seconds."""
        assert self._guest is not None
        end = time.monotonic() + seconds
        while self._guest.poll() is None and not (self.directory / "status").exists():
            if time.monotonic() > end:
                self.cut()
                raise GuestFailed(f"it took longer than {seconds:.0f} s; the end of the console:\n{self._console()}")
            self._show()
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guest.wait(60)
        self.cut()
        self._show()
        try:
            return int((self.directory / "status").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise GuestFailed(f"the guest died; the end of its console:\n{self._console()}") from error

    def cut(self) -> None:
        """Cut the power: the guest's memory is lost, its disk keeps what was written to it. Nothing if it is off."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        if self._guest is None:
            return
        while _group(self._guest.pid):      # the guest's processes are children of the kernel's, of the same group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guest.pid, signal.SIGKILL)
            self._guest.poll()
            time.sleep(0.01)
        self._guest.wait()
        self._guest = None

    def alive(self) -> bool:
        """Whether the command is still at work."""
        return self._guest is not None and self._guest.poll() is None and not (self.directory / "status").exists()

    def run(self, command: str, seconds: float) -> int:
        """`start` and `wait`."""
        self.start(command)
        return self.wait(seconds)

    def output(self) -> str:
        """What the command wrote."""
        try:
            return (self.directory / "output").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _show(self) -> None:
        text = self.output()
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)

    def _console(self) -> str:
        text = (self.directory / "console").read_text(errors="replace")
        return "\n".join(text.splitlines()[-25:])


def _group(group: int) -> bool:
    """Whether a process of this group is left, other than as a zombie that only its parent's `wait` removes."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state != "Z":
                    return True
    return False


def _program(name: str) -> str:
    found = shutil.which(name, path=SBIN)
    assert found is not None
    return found


def _prepare(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotBoot(f"{shlex.join(argv)}: {done.stderr.strip()}")


def main(argv: list[str]) -> int:
    if argv == ["missing"]:
        print(*missing() if _fits() else ())
        return 0
    if len(argv) != 2 or argv[0] != "run":
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with Lab() as lab:
            return lab.run(argv[1], 3600)
    except (CannotBoot, GuestFailed) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
