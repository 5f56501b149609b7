"""Trainings on this machine: a pool of worker processes, one for each that may go on at a time.

A pool gets tasks and says how each ended. It knows nothing of suites.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domainshift.lease import Lease
from domainshift.records.results import device_name
from domainshift.sweep.state import LOG
from domainshift.sweep.worker import PARENT

COMMAND = (sys.executable, str(Path(__file__).with_name("worker.py")))  # tests put a stand-in here
LAST_LINES = 5  # of the log, in the record of a failure


class Task(NamedTuple):
    """A training to make, and the lease of its folder."""

    name: str
    values: Mapping[str, Any]
    tests: Sequence[Mapping[str, Any]]
    folder: Path
    lease: Lease

    def line(self, folder: Path, log: Path) -> bytes:
        """The line that a worker reads; paths are those of its machine."""
        job = {"name": self.name, "values": self.values, "tests": self.tests}
        place = {"folder": str(folder), "log": str(log), "token": self.lease.token}
        return (json.dumps(job | place) + "\n").encode()


class Failure(NamedTuple):
    """How a training failed."""

    status: int | None  # as of run.py, or of the worker; negative: a signal; None: it never ended
    lines: list[str]  # the last ones that it printed, or what kept it from ending


class Ended(NamedTuple):
    task: Task
    failure: Failure | None
    seconds: float  # that the training and its tests took


def failure_of(status: int, log: bytes) -> Failure | None:
    """None for status 0; else with the last lines of what was printed."""
    if status == 0:
        return None
    lines = [line.rstrip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    lines = lines[-LAST_LINES:]
    if status < 0:
        lines.append(f"killed by {signal.Signals(-status).name}")
    return Failure(status, lines)


# --- one process ------------------------------------------------------------------------------


class Worker:
    """A process of `worker.py`, started for its first task and replaced when it has ended."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen | None = None
        self.task: Task | None = None
        self.start_time = 0.0
        self.log_start = 0

    def start(self, task: Task) -> None:
        log = task.folder / LOG
        if self.process is not None and self.process.poll() is not None:  # killed while it waited
            self.stop()
        with open(log, "ab") as output:
            self.log_start = output.tell()
            if self.process is None:
                self.process = subprocess.Popen(
                    COMMAND,
                    env=os.environ | self.environment | {PARENT: str(os.getpid())},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                )
        self.task, self.start_time = task, time.monotonic()
        try:
            self.process.stdin.write(task.line(task.folder.absolute(), log.absolute()))
            self.process.stdin.flush()
        except BrokenPipeError:  # it is dying: its answer is the end of the file
            pass

    def ended(self) -> Ended:
        """How the task ended. Waits for the answer, or for the end of the process."""
        task, line = self.task, self.process.stdout.readline()
        log = (task.folder / LOG).read_bytes()[self.log_start :]
        self.task = None
        if line:
            answer = json.loads(line)
            if answer["ends"]:
                self.stop()
            return Ended(task, failure_of(answer["status"], log), answer["seconds"])
        status = self.process.wait()
        self.stop()
        failure = failure_of(status, log) or Failure(0, ["its worker ended before it did"])
        return Ended(task, failure, time.monotonic() - self.start_time)

    def stop(self) -> None:
        """End the process at once. Files are written whole or not at all, so nothing is lost."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process = None


# --- all of them ------------------------------------------------------------------------------


def slots(
    device: str, *, jobs: int | None, per_device: int, gpus: int, cores: int
) -> list[dict[str, str]]:
    """The environment of each worker.

    Args:
        device: "cpu": `jobs` workers (default 1). "cuda": `per_device` on each of `gpus`, at most
            `jobs` in all, in an order that takes the GPUs in turn.
        cores: of the CPU, divided among the workers. A set OMP_NUM_THREADS is left as it is.
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
    """Workers on this machine.

    Attributes:
        device: "cpu" or "cuda".
        device_name: of the processor or GPU.
        threads: of each worker on a CPU.
        size: number of workers.
    """

    def __init__(self, device: str, environments: Sequence[Mapping[str, str]]) -> None:
        self.device, self.device_name = device, device_name(device)
        self.size = len(environments)
        self.threads = int(environments[0].get("OMP_NUM_THREADS", 1))
        self.workers = [Worker(environment) for environment in environments]
        self.free = deque(self.workers)
        self.selector = selectors.DefaultSelector()

    def room(self) -> bool:
        return bool(self.free)

    def start(self, task: Task) -> None:
        worker = self.free.popleft()
        worker.start(task)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def finished(self, timeout: float) -> list[Ended]:
        """The tasks that ended, after a wait of at most `timeout` seconds for a first one."""
        ended = []
        for key, _ in self.selector.select(timeout):
            self.selector.unregister(key.fileobj)
            ended.append(key.data.ended())
            self.free.append(key.data)
        return ended

    def stop(self) -> None:
        """End all workers. What they were at can go on from its last epoch."""
        for worker in self.workers:
            worker.stop()
        self.selector.close()
