"""The right to write to a folder, which one process has at a time.

A lease is a file `.lease-N` in the folder. It asks nothing of the file system but that of several
processes that create a file exclusively (O_EXCL) one succeeds, and that who created a file sees all that
were there before, so network file systems without locks serve too. The owner of a lease touches it every
`BEAT` seconds.

A lease has expired if its owner is a process of this machine that is gone, or if nobody touched it for
`EXPIRY` seconds. Nobody removes another's lease to take the folder: who finds all leases expired creates
the file of the next number above them, which names those that it follows, and then looks again. The
folder is its own if it finds what it found before and its own file; otherwise it withdraws.

Why no two have a folder: of two that created their files, the later one looks again when the file of the
earlier one is there. It takes the folder only if it found that file expired before.

What may lie there besides, and why it does no harm:

- A gap in the numbers. A release removes the leases that it follows from the lowest on and its own last,
  so as long as any of them is left, one more is there that counts. A kill between two of these steps
  leaves the later ones; they expire, and the next owner follows and removes them.
- The file of one who looked too early, and follows leases that were released meanwhile. It withdraws.
  Until then it keeps others away, but no owner takes it for a loss, because it does not follow the owner's.
  If it is killed first, its file is one more that expires.
- A file without contents: of one who is about to write them, or was cut off. It counts as a lease until
  nobody touched it for `EXPIRY` seconds, and so does a link to nowhere.

An owner that was not running for longer than `EXPIRY` finds its file gone, or a lease that follows it.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from domainshift.errors import ConfigError, RecordError

BEAT = 20.0  # seconds
EXPIRY = 300.0  # seconds
WRITTEN = 2.0  # seconds within which a file that was created has its contents

NAME = re.compile(r"\.lease-([1-9][0-9]*)")  # of a lease's file


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
        follows: the tokens of the expired leases that this one follows, with spaces between.
    """

    host: str
    machine: str
    process: int
    birth: str
    since: float
    token: str
    follows: str = ""

    def __str__(self) -> str:
        if self is NOBODY:
            return "a process that was cut off while it took the folder"
        return f"process {self.process} on {self.host}, for {age(time.time() - self.since)}"


NOBODY = Owner("", "", 0, "", 0.0, "")  # of a file whose writer was cut off, or has not written yet


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
        return clock_of(path.parent) - path.lstat().st_mtime > EXPIRY
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
        return NOBODY if path.is_symlink() else None
    except (ValueError, TypeError):
        return NOBODY


def leases(folder: Path) -> dict[int, Owner]:
    """The owners of all leases of a folder, expired ones too, by number, the lowest first."""
    numbers = (NAME.fullmatch(name) for name in os.listdir(folder))
    present = {int(n[1]): owner_of(path_of(folder, int(n[1]))) for n in numbers if n}
    return {number: owner for number, owner in sorted(present.items()) if owner is not None}


def living(folder: Path, present: Mapping[int, Owner]) -> Owner | None:
    """Of these leases the owner of the highest that has not expired; None: all have."""
    for number, owner in sorted(present.items(), reverse=True):
        if not has_expired(path_of(folder, number), owner):
            return owner
    return None


def holder(folder: Path) -> Owner | None:
    """Who has the lease of a folder now. None: nobody, or an owner that is gone."""
    return living(folder, leases(folder))


class Lease:
    """The right to write to `folder`, until `release`. As a context manager it releases itself.

    Attributes:
        token: names this lease to another process that writes on behalf of its owner.
        followed: the owners of the expired leases that this one follows, by number.
    """

    def __init__(
        self, folder: Path, number: int, token: str, followed: Mapping[int, Owner] | None = None
    ) -> None:
        self.folder, self.number, self.token = folder, number, token
        self.followed = dict(followed or {})
        self._released = threading.Event()

    @property
    def path(self) -> Path:
        return path_of(self.folder, self.number)

    @property
    def before(self) -> Owner | None:
        """The owner of the last expired lease that this one follows; None without one."""
        return self.followed[max(self.followed)] if self.followed else None

    def confirm(self) -> None:
        """Raises Lost where another process has taken the lease over."""
        owner = owner_of(self.path)
        if owner is None or owner.token != self.token or self._is_followed():
            raise Lost(
                f"{self.folder} was taken over by {holder(self.folder) or 'another process'}: this one "
                f"did not touch its lease for {EXPIRY:.0f} s. Nothing more is written here"
            )

    def _is_followed(self) -> bool:
        """Whether another process holds a lease after this one."""
        end = time.monotonic() + WRITTEN
        while NOBODY in (after := self._later()) and time.monotonic() < end:
            time.sleep(0.01)
        return any(owner is NOBODY or self.token in owner.follows.split() for owner in after)

    def _later(self) -> list[Owner]:
        return [owner for n, owner in leases(self.folder).items() if n > self.number]

    def release(self) -> None:
        """Let go of the folder. A second call, and one after a loss, do nothing."""
        self._released.set()
        try:
            self.confirm()
        except Lost:
            return
        for number in (*sorted(self.followed), self.number):  # the own one guards the expired ones
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

    Who meets others at the same moment tries again, for `WRITTEN` seconds.

    Raises:
        Busy: another process has it. The message names its host, its number and its age.
        OSError: nothing can be written there.
    """
    end = time.monotonic() + WRITTEN
    while True:
        present = leases(folder)
        other = living(folder, present)
        if other is None and (lease := follow(folder, present)):
            lease.keep()
            return lease
        if other not in (None, NOBODY) or time.monotonic() > end:
            who = other or holder(folder) or "other processes that try to take it"
            raise Busy(f"{str(folder)!r} is in use by {who}")
        time.sleep(random.uniform(0, 0.1))


def follow(folder: Path, present: Mapping[int, Owner]) -> Lease | None:
    """The lease after some that have expired; None where these are not all any more.

    Raises OSError: nothing can be written there.
    """
    own = Owner(
        host=socket.gethostname(),
        machine=machine(),
        process=os.getpid(),
        birth=birth_of(os.getpid()) or "",
        since=time.time(),
        token=uuid4().hex,
        follows=" ".join(owner.token for owner in present.values() if owner.token),
    )
    number = max(present, default=0) + 1
    path = path_of(folder, number)
    try:
        file = open(path, "xb")
    except FileExistsError:
        return None
    try:
        with file:
            file.write(json.dumps(asdict(own)).encode())
    except BaseException:  # a full disk, say
        path.unlink(missing_ok=True)
        raise
    now = leases(folder)
    if now == {**present, number: own}:
        return Lease(folder, number, own.token, present)
    if now.get(number) == own:  # after a long sleep it may be another's
        path.unlink(missing_ok=True)
    return None


def on_behalf(folder: Path, token: str) -> Lease:
    """The lease that another process holds for this one. Raises Lost where it does not."""
    clock_of(folder)  # a network file system then lists the folder again
    own = (number for number, owner in leases(folder).items() if owner.token == token)
    lease = Lease(folder, next(own, 0), token)
    lease.confirm()
    return lease
