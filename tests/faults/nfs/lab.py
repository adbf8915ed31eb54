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
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
HANGS = "HANGS "
"""How a line of hung.py's begins that names what hangs in the guest's kernel."""
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
SILENCE_S = 180.0
"""Longest that a command may say nothing. The storm says a line every 20 s; what is not synced comes within 35 s."""
ANSWER_S = 180.0
"""Longest that a guest may take to say what hangs in it (hung.py): it tries for 40 s."""


class CannotBoot(Exception):
    """The guest does not come up on this machine; the message says why."""


class GuestFailed(Exception):
    """The guest came up, and then its command fell silent or it died; the message has all that is known."""


class GuestHung(GuestFailed):
    """It fell silent, and hung.py found that its kernel hangs, which says nothing about what ran in it."""


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
        for name in ("up", "status", "output", "ask", "answer", "answered"):
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

    def wait(self, silence: float = SILENCE_S) -> int:
        """The command's exit status; its output is shown as it comes. GuestFailed once none came for so long."""
        self.follow(lambda: not self.alive(), self._show, silence)
        if self._guest is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guest.wait(60)
        self.cut()
        self._show()
        try:
            return int((self.directory / "status").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise GuestFailed(f"the guest died; {self._last_words()}") from error

    def follow(self, over: Callable[[], bool], progress: Callable[[], int], silence: float = SILENCE_S) -> None:
        """Until it is `over`. Once `progress` stood still for so long, the guest is asked what hangs, and is cut."""
        last, still, looked_at = -1, 0.0, time.monotonic()
        while not over():
            now, at = time.monotonic(), progress()
            # While this machine itself stood still, so did the guest.
            still = still + min(now - looked_at, 1.0) if at == last else 0.0
            last, looked_at = at, now
            if still > silence:
                answer = self._ask()
                self.cut()
                hung = any(line.startswith(HANGS) for line in answer.splitlines())
                raise (GuestHung if hung else GuestFailed)(
                    f"nothing came from the guest for {silence:.0f} s; {self._last_words()}\n"
                    f"asked what hangs, it said:\n{answer}"
                )
            time.sleep(0.2)

    def _ask(self) -> str:
        """What hung.py finds inside the guest. One that does not answer proves nothing."""
        answer, begin = self.directory / "answer", self._cpu_s()
        (self.directory / "ask.new").write_text(shlex.join([sys.executable, "-S", str(HERE / "hung.py")]))
        (self.directory / "ask.new").rename(self.directory / "ask")
        end = time.monotonic() + ANSWER_S
        while time.monotonic() < end and self.alive() and not (self.directory / "answered").exists():
            time.sleep(0.2)
        found = answer.read_text(errors="replace") if answer.exists() else "nothing\n"
        return f"{found}its kernel used {self._cpu_s() - begin:.0f} s of CPU meanwhile"

    def _cpu_s(self) -> float:
        """CPU time of the guest's kernel, by which one that spins can be told from one that waits."""
        assert self._guest is not None
        try:
            fields = Path(f"/proc/{self._guest.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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

    def run(self, command: str, silence: float = SILENCE_S) -> int:
        """`start` and `wait`."""
        self.start(command)
        return self.wait(silence)

    def output(self) -> str:
        """What the command wrote."""
        try:
            return (self.directory / "output").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _show(self) -> int:
        """Show what is new of the output; how much there is by now."""
        text = self.output()
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)
        return self._shown

    def _console(self, lines: int = 25) -> str:
        """Its end; of stacks without what is not sure to be part of one."""
        text = (self.directory / "console").read_text(errors="replace")
        return "\n".join([line for line in text.splitlines() if "] ? " not in line][-lines:])

    def _last_words(self) -> str:
        """The end of what the command wrote and of the console: what was shown of it may have scrolled away."""
        said = "\n".join(self.output().splitlines()[-25:])
        return f"the end of its output:\n{said}\nthe end of its console:\n{self._console(150)}"


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
