"""A process that makes trainings, one after another, so that torch is imported once.

It reads one job per line from standard input, as JSON, and answers each with one line:

    {"name": ..., "values": {...}, "tests": [...], "folder": ..., "log": ..., "token": ...}
    {"name": ..., "status": 0, "seconds": 12.3, "ends": false}

`token` is that of the lease which the suite holds; without it the run takes one. The statuses are
those of run.py. `ends` is true after an error that nobody foresaw: it may have harmed the process,
which therefore ends. What a job prints is appended to its log. The process dies with the one that
started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PARENT = "FASTSHAPE_PARENT"  # in the environment: who started this

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the suite, which ends this process
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        sys.exit("the process that started this worker is gone")
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import gc  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402

from domainshift.config import Test  # noqa: E402
from domainshift.errors import BadInput, Failure  # noqa: E402
from domainshift.methods import blamed  # noqa: E402
from domainshift.progress import Screen, show_any_name  # noqa: E402
from domainshift.setup import set_up  # noqa: E402
from domainshift.training.run import execute  # noqa: E402

FAILED, BAD_INPUT = 1, 2


def serve() -> None:
    """Answer jobs until there are no more, or until an error that nobody foresaw."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout.reconfigure(line_buffering=True)
    show_any_name()
    for line in sys.stdin:
        job = json.loads(line)
        print_to(job["log"])
        start, status, ends = time.perf_counter(), 0, False
        try:
            tests = [Test.model_validate(test) for test in job["tests"]]
            folder, screen = Path(job["folder"]), Screen()
            with blamed():
                setup = set_up(job["values"])
                execute(
                    setup,
                    tests=tests,
                    folder=folder,
                    resume=True,
                    screen=screen,
                    token=job.get("token"),
                )
        except (BadInput, Failure) as error:
            print(f"error: {error}", file=sys.stderr)
            status = BAD_INPUT if isinstance(error, BadInput) else FAILED
        except Exception:
            traceback.print_exc()
            status, ends = FAILED, True
        seconds = time.perf_counter() - start
        answer = {"name": job["name"], "status": status, "seconds": seconds, "ends": ends}
        print(json.dumps(answer), file=answers)
        if ends:
            return
        gc.collect()  # the network, before the next one is built


def print_to(log: str) -> None:
    """Append to a file what this process and its children print from now on."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


if __name__ == "__main__":
    serve()
