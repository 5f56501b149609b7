"""Where the runs of a suite are executed: on this machine's devices, or on a Ray cluster.

A pool is given jobs and says how each ended. It knows nothing of suites.

As a script this file is run.py, in a process that dies with the one that started it:

    python experiments/workers.py --target sketch --mode da
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PARENT = "FASTSHAPE_PARENT"  # in the environment of a run: who started it

if __name__ == "__main__" and sys.platform == "linux":  # first of all: what follows takes seconds
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("who started this is gone")

import record  # noqa: E402

# The words of one run follow. Tests put a stand-in here.
COMMAND = (sys.executable, str(Path(__file__).resolve()))

LOG = "log.txt"  # what a run printed, in its folder
LAST_LINES = 5  # of that, in the record of a failure
STOP_SECONDS = 10.0  # for a run to end after an interrupt, before it is killed

# Ray: a task whose node or worker died is started again this often. A run that fails by itself is not.
RETRIES = 10
IN_FLIGHT = 256  # each submitted run holds a lock, and so an open file


class WorkersError(ValueError):
    """A pool cannot be had as asked; the message says why."""


class Job(NamedTuple):
    """A run to execute, and the lock that its folder is held by."""

    name: str
    words: Sequence[str]  # switches, as after `run.py`; without --out and --resume
    folder: Path
    lock: BinaryIO


class Failure(NamedTuple):
    """How a run failed."""

    status: int | None  # the process's exit status, negative for a signal; None: it never ended
    lines: list[str]  # the last ones it printed, or what kept it from ending


def outcome(status: int, log: Path, since: int = 0) -> Failure | None:
    """None for exit status 0; else the last lines that `log` got after its first `since` bytes."""
    if status == 0:
        return None
    lines = log.read_bytes()[since:].decode(errors="replace").splitlines()
    lines = [line.rstrip() for line in lines if line.strip()][-LAST_LINES:]
    if status < 0:
        lines.append(f"killed by {signal.Signals(-status).name}")
    return Failure(status, lines)


# --- this machine -----------------------------------------------------------------------------


def slots(
    device: str, *, jobs: int | None, per_device: int, gpus: int, cores: int
) -> list[dict[str, str]]:
    """The environment of each run that may go on at the same time.

    Args:
        device: "cpu": `jobs` slots (default 1). "cuda": `per_device` on each of `gpus`, at most
            `jobs` in all, in an order that takes the GPUs in turn.
        cores: of the CPU, divided among the slots. A set OMP_NUM_THREADS is left as it is.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    if device == "cuda":
        places = [{"CUDA_VISIBLE_DEVICES": name} for name in names[:gpus]] * per_device
        places = places[:jobs]
    else:
        places = [{}] * (jobs or 1)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // max(1, len(places)))))
    return [place | {"OMP_NUM_THREADS": threads} for place in places]


class Local:
    """Runs as processes of this machine, one a slot.

    A process inherits its folder's lock, so the folder stays locked as long as anything writes
    to it, even where the suite is gone.
    """

    def __init__(self, places: Sequence[Mapping[str, str]]) -> None:
        self.size = len(places)
        self.free = list(places)
        self.active: list[tuple[Job, subprocess.Popen, Mapping[str, str], int]] = []

    def room(self) -> bool:
        return bool(self.free)

    def start(self, job: Job) -> None:
        place = self.free.pop(0)
        with open(job.folder / LOG, "ab") as log:
            since = log.tell()
            process = subprocess.Popen(
                [*COMMAND, *job.words, "--out", str(job.folder), "--resume"],
                env=os.environ | place | {PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(job.lock.fileno(),),
            )
        self.active.append((job, process, place, since))

    def finished(self, timeout: float) -> list[tuple[Job, Failure | None]]:
        """The jobs that ended, after a wait of at most `timeout` seconds for a first one."""
        deadline = time.monotonic() + timeout
        while not (ended := [a for a in self.active if a[1].poll() is not None]):
            if time.monotonic() >= deadline:
                return []
            time.sleep(0.02)
        for entry in ended:
            self.active.remove(entry)
            self.free.append(entry[2])
        return [(j, outcome(p.returncode, j.folder / LOG, since)) for j, p, _, since in ended]

    def stop(self) -> None:
        """End what is going on; each run can be continued from its last epoch."""
        for signum in (signal.SIGINT, signal.SIGKILL):
            for _, process, _, _ in self.active:
                process.send_signal(signum)
            deadline = time.monotonic() + STOP_SECONDS
            while any(a[1].poll() is None for a in self.active) and time.monotonic() < deadline:
                time.sleep(0.02)
        self.active.clear()


# --- a cluster --------------------------------------------------------------------------------


def execute(command: Sequence[str], words: Sequence[str], log: str) -> tuple[int, dict[str, bytes]]:
    """On a node: one run, in a folder that is gone afterwards.

    Returns its exit status and its files but for the checkpoint: at most some hundred kB.
    """
    with tempfile.TemporaryDirectory(prefix="fastshape-suite-") as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        with open(folder / log, "wb") as output:
            process = subprocess.run(
                [*command, *words, "--out", str(folder), "--resume"],
                env=os.environ | {PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        kept = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pt"]
        files = {path.name: path.read_bytes() for path in kept if not path.name.startswith(".")}
    return process.returncode, files


class Ray:
    """Runs as tasks of a Ray cluster: each takes one CPU and, where there are GPUs, a part of one.

    Every node needs this checkout at the same path, in an environment with fastshape, and the data
    and weights at the paths that the switches name. No disk is shared: a task sends its files
    back, and they are written here. A task whose node dies is run again on another one.

    Args:
        address: of the cluster, as `ray.init` takes it ("auto", "host:6379").
        per_device: runs at a time on one GPU.
        gpu: whether to use GPUs; None: if the cluster has any.

    Raises WorkersError: Ray is not installed, no cluster answers, or it has no GPU but `gpu`.
    """

    def __init__(self, address: str, per_device: int, gpu: bool | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise WorkersError(f"--ray-address needs Ray (pip install ray): {error}") from error
        self.ray = ray
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # at a closed port Ray itself tries for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkersError(f"ray-address: no cluster at {address!r}: {reason}") from error
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own there
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        if gpu and not gpus:
            raise WorkersError(f"device: 'cuda' asked for, but the cluster at {address!r} has none")
        self.device = "cuda" if gpus and gpu is not False else "cpu"
        cpus = int(resources.get("CPU", 1))
        self.size = min(gpus * per_device, cpus) if self.device == "cuda" else cpus
        # by value, so that a node need not find this module to read the task
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.task = ray.remote(execute).options(
            num_cpus=1,
            num_gpus=1 / per_device if self.device == "cuda" else 0,
            max_retries=RETRIES,
        )
        self.active: dict[Any, Job] = {}

    def room(self) -> bool:
        return len(self.active) < IN_FLIGHT

    def start(self, job: Job) -> None:
        self.active[self.task.remote(COMMAND, list(job.words), LOG)] = job

    def finished(self, timeout: float) -> list[tuple[Job, Failure | None]]:
        """The jobs that ended, after a wait of at most `timeout` seconds for a first one."""
        if not self.active:
            time.sleep(timeout)
            return []
        ended, _ = self.ray.wait(list(self.active), timeout=timeout)
        jobs = [(self.active.pop(ref), ref) for ref in ended]
        return [(job, self.receive(ref, job)) for job, ref in jobs]

    def receive(self, ref: Any, job: Job) -> Failure | None:
        try:
            status, files = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            return Failure(None, str(error).strip().splitlines()[-LAST_LINES:])
        if status:  # a part of a record, without its checkpoint, is of no use here
            files = {LOG: files[LOG]}
        # of a run that was begun on this machine; the record that comes is not from it
        (job.folder / "checkpoint.pt").unlink(missing_ok=True)
        for name in sorted(files, key="summary.json".__eq__):  # it says that the others are there
            record.write_bytes(job.folder / name, files[name])
        return outcome(status, job.folder / LOG)

    def stop(self) -> None:
        """End what is going on. Those runs start from the beginning next time."""
        for ref in self.active:
            self.ray.cancel(ref, force=True)
        self.active.clear()
        self.ray.shutdown()


if __name__ == "__main__":
    import run

    sys.exit(run.main())
