"""The right to write to a folder, which one process has at a time.

A lease is a file `.lease-N` in the folder. It asks nothing of the file system but that of several
processes that create a file exclusively (O_EXCL) one succeeds, so network file systems without locks
serve too. Its owner touches it every `BEAT` seconds.

A lease has expired if its owner is a process of this machine that is gone, or if nobody touched it for
`EXPIRY` seconds. Nobody removes another's lease: who finds it expired creates the file of the next
number, so that of two who find it one succeeds. That file names the lease it follows. One who looked
too early and creates a file of the next number follows a lease that is no longer there; it withdraws,
and no owner takes the file for a loss.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from domainshift.errors import ConfigError, RecordError

BEAT = 20.0  # seconds
EXPIRY = 300.0  # seconds
WRITTEN = 2.0  # seconds within which a file that was created has its contents


class Busy(ConfigError):
    """Another process has the lease of a folder."""


class Lost(RecordError):
    """The lease of a folder went to another process, because it was not touched for too long."""


@dataclass(frozen=True)
class Owner:
    """Who has a lease.

    Attributes:
        machine: which running system the process belongs to; two containers are two.
        birth: when the system started the process, in its own units; "" where it does not tell.
        since: seconds since the epoch, by the owner's clock.
        token: of this lease; no other has it.
        follows: the token of the expired lease that this one follows; "" without one.
    """

    host: str
    machine: str
    process: int
    birth: str
    since: float
    token: str
    follows: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, for {age(time.time() - self.since)}"


NOBODY = Owner("an unknown host", "", 0, "", 0.0, "")  # of a file whose writer was cut off


def age(seconds: float) -> str:
    """A duration in its largest unit: "40 s", "5 min", "3 h", "2 days"."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{max(0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


# --- processes --------------------------------------------------------------------------------


def machine() -> str:
    """A name of the running system, and of the name space of its processes."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        pass
    return " ".join(parts)


def birth_of(process: int) -> str | None:
    """When a process of this machine was started; "" where that cannot be told; None: it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            line = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        except OSError:
            return None
        state, *numbers = line.rpartition(")")[
            2
        ].split()  # before it the name, which may hold anything
        return None if state in "ZX" else numbers[18]
    if os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # it is another user's
            pass
    return ""


def has_expired(path: Path, owner: Owner) -> bool:
    """Whether the owner of a lease is gone, or its file."""
    if owner.machine == machine():
        birth = birth_of(owner.process)
        if birth is None or (birth and owner.birth):
            return birth != owner.birth
    try:
        return clock_of(path.parent) - path.stat().st_mtime > EXPIRY
    except FileNotFoundError:
        return True


def clock_of(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which may be another machine's."""
    probe = folder / f".lease-clock-{uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


# --- leases -----------------------------------------------------------------------------------


def path_of(folder: Path, number: int) -> Path:
    return folder / f".lease-{number}"


def owner_of(path: Path) -> Owner | None:
    """The owner that a lease's file names; None without a file."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return NOBODY


def holder(folder: Path) -> Owner | None:
    """Who has the lease of a folder now. None: nobody, or an owner that is gone."""
    number = 1
    while owner := owner_of(path_of(folder, number)):
        if not has_expired(path_of(folder, number), owner):
            return owner
        number += 1
    return None


class Lease:
    """The right to write to `folder`, until `release`. As a context manager it releases itself.

    Attributes:
        token: names this lease to another process that writes on behalf of its owner.
        before: the owner of the expired lease that this one follows; None without one.
    """

    def __init__(self, folder: Path, number: int, token: str, before: Owner | None = None) -> None:
        self.folder, self.number, self.token, self.before = folder, number, token, before
        self._released = threading.Event()

    @property
    def path(self) -> Path:
        return path_of(self.folder, self.number)

    def confirm(self) -> None:
        """Raises Lost where another process has taken the lease over."""
        owner = owner_of(self.path)
        if owner is None or owner.token != self.token or self._is_followed():
            raise Lost(
                f"{self.folder} was taken over by {holder(self.folder) or 'another process'}: this one "
                f"did not touch its lease for {EXPIRY:.0f} s. Nothing more is written here"
            )

    def _is_followed(self) -> bool:
        """Whether another process holds the lease after this one."""
        path, end = path_of(self.folder, self.number + 1), time.monotonic() + WRITTEN
        while (after := owner_of(path)) is NOBODY and time.monotonic() < end:
            time.sleep(0.01)
        return after is NOBODY or (after is not None and after.follows == self.token)

    def release(self) -> None:
        """Let go of the folder. A second call, and one after a loss, do nothing."""
        self._released.set()
        try:
            self.confirm()
        except Lost:
            return
        for number in range(1, self.number + 1):  # the own one last: it guards the expired ones
            path_of(self.folder, number).unlink(missing_ok=True)

    def keep(self) -> None:
        """Touch the file until `release`, in a thread of its own."""
        threading.Thread(target=self._beat, name=f"lease of {self.folder}", daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # `confirm` tells
                os.utime(self.path)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def take(folder: Path) -> Lease:
    """The lease of a folder that exists.

    Raises:
        Busy: another process has it. The message names its host, its number and its age.
        OSError: nothing can be written there.
    """
    own = Owner(
        host=socket.gethostname(),
        machine=machine(),
        process=os.getpid(),
        birth=birth_of(os.getpid()) or "",
        since=time.time(),
        token=uuid4().hex,
    )
    number, before = 1, None
    while True:
        path = path_of(folder, number)
        try:
            with open(path, "xb") as file:
                mine = replace(own, follows=before.token) if before else own
                file.write(json.dumps(asdict(mine)).encode())
        except FileExistsError:
            owner = owner_of(path)
            if owner is None:  # released just now
                number, before = 1, None
            elif not has_expired(path, owner):
                raise Busy(f"{str(folder)!r} is in use by {owner}") from None
            else:
                number, before = number + 1, owner
            continue
        # what was expired must still be there, and nobody further on: else a release went on meanwhile
        below = owner_of(path_of(folder, number - 1)) if before else None
        if below == before and not path_of(folder, number + 1).exists():
            lease = Lease(folder, number, own.token, before)
            lease.keep()
            return lease
        path.unlink(missing_ok=True)
        number, before = 1, None
        time.sleep(random.uniform(0, 0.1))


def on_behalf(folder: Path, token: str) -> Lease:
    """The lease that another process holds for this one. Raises Lost where it does not."""
    number = 1
    while (owner := owner_of(path_of(folder, number))) and owner.token != token:
        number += 1
    lease = Lease(folder, number, token)
    lease.confirm()
    return lease
