"""Trainings as tasks of a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainshift import files
from domainshift.errors import SuiteError
from domainshift.records.schema import CHECKPOINT, EVALUATIONS, SUMMARY, TRAINING
from domainshift.sweep import local
from domainshift.sweep.local import LAST_LINES, Ended, Failure, Task, failure_of
from domainshift.sweep.state import LOG
from domainshift.sweep.worker import PARENT

RETRIES = 10  # starts of a task whose node died; one that fails by itself is not started again
IN_FLIGHT = 256  # each submitted task holds a lease, which a thread touches


def make(
    command: Sequence[str], job: dict[str, Any], parent: str, log: str
) -> tuple[int, float, dict[str, bytes]]:
    """On a node: one training, in a folder that is gone afterwards.

    Returns the status, the seconds it took, and its files by name, without the checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="fastshape-suite-") as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        job = {**job, "folder": str(folder), "log": str(folder / log)}
        start = time.monotonic()
        with open(folder / log, "wb") as output:
            process = subprocess.run(
                command,
                env=os.environ | {parent: str(os.getpid())},
                input=(json.dumps(job) + "\n").encode(),
                stdout=subprocess.PIPE,
                stderr=output,
                check=False,
            )
        status, seconds = process.returncode, time.monotonic() - start
        if process.stdout:
            answer = json.loads(process.stdout)
            status, seconds = answer["status"], answer["seconds"]
        kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt"]
        content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}
    return status, seconds, content


class Cluster:
    """Each task takes one CPU and, where there are GPUs, a part of one.

    Every node needs this checkout at the same path, in an environment with fastshape, and the data
    and weights at the paths that the switches name. No disk is shared: a task sends its files back,
    and they are written here. A task whose node dies is made again on another one.

    Args:
        address: of the cluster, as `ray.init` takes it ("auto", "host:6379").
        per_device: tasks at a time on one GPU.
        gpu: whether to use GPUs; None: if the cluster has any.

    Raises SuiteError: Ray is not installed, no cluster answers, or it has no GPU but `gpu`.
    """

    threads = 1

    def __init__(self, address: str, per_device: int, gpu: bool | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise SuiteError(f"--ray-address needs Ray (pip install ray): {error}") from error
        self.ray = ray
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # at a closed port Ray itself tries for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SuiteError(f"ray-address: no cluster at {address!r}: {reason}") from error
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own there
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        if gpu and not gpus:
            raise SuiteError(f"device: 'cuda' asked for, but the cluster at {address!r} has none")
        self.device = "cuda" if gpus and gpu is not False else "cpu"
        self.device_name = f"a {self.device} node of a Ray cluster"
        self.size = min(gpus * per_device, cpus) if self.device == "cuda" else cpus
        # by value, so that a node need not find this module to read the task
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.task = ray.remote(make).options(
            num_cpus=1,
            num_gpus=1 / per_device if self.device == "cuda" else 0,
            max_retries=RETRIES,
        )
        self.active: dict[Any, Task] = {}

    def room(self) -> bool:
        return len(self.active) < IN_FLIGHT

    def start(self, task: Task) -> None:
        job = {"name": task.name, "values": task.values, "tests": list(task.tests)}
        self.active[self.task.remote(list(local.COMMAND), job, PARENT, LOG)] = task

    def finished(self, timeout: float) -> list[Ended]:
        """The tasks that ended, after a wait of at most `timeout` seconds for a first one."""
        if not self.active:
            time.sleep(timeout)
            return []
        references, _ = self.ray.wait(list(self.active), timeout=timeout)
        return [self.receive(reference, self.active.pop(reference)) for reference in references]

    def receive(self, reference: Any, task: Task) -> Ended:
        try:
            status, seconds, content = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()[-LAST_LINES:]
            return Ended(task, Failure(None, lines), 0.0)
        if status:  # a part of a record, without its checkpoint, is of no use here
            content = {LOG: content[LOG]}
        # of a run that was begun on this machine; the record that comes is not from it
        (task.folder / CHECKPOINT).unlink(missing_ok=True)
        (task.folder / EVALUATIONS).mkdir(exist_ok=True)
        # what says that others are there comes after them
        for name in sorted(
            content, key=lambda n: (n == SUMMARY, n == TRAINING, n.endswith("json"))
        ):
            files.write_bytes(task.folder / name, content[name])
        return Ended(task, failure_of(status, content[LOG]), seconds)

    def stop(self) -> None:
        """End what is going on. Those trainings start from the beginning next time."""
        for reference in self.active:
            self.ray.cancel(reference, force=True)
        self.active.clear()
        self.ray.shutdown()
