"""A stand-in for worker.py, to test scheduling: it sleeps, fails or leaves a record as ordered."""

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

from domainshift import files
from domainshift.records.results import figures
from domainshift.records.schema import EVALUATIONS, METRICS, TRAINING, VERSION
from domainshift.sweep import command, local, sweeping
from paper_data import DATA, expanded, on_paper

# Started without site-packages, so in some 20 ms. Its first argument is the folder with its orders.
PROGRAM = """
import json, os, shutil, sys, time
from pathlib import Path
orders, answers = Path(sys.argv[1]), os.fdopen(os.dup(1), "w", buffering=1)
def note(event):
    gpu, threads = (os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
    line = f"{time.monotonic()} {event} {key} {gpu} {threads} {os.getpid()}\\n"
    descriptor = os.open(orders / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
def order(what):
    path = orders / key / what
    return path.read_text() if path.exists() else None
for line in sys.stdin:
    job = json.loads(line)
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    key = f"{job['values']['p_zero'][0]}-{job['values']['seed']}"
    note("start")
    time.sleep(float(order("sleep") or 0))
    status = order("fail")
    if status is None:
        shutil.copytree(orders / key / "record", job["folder"], dirs_exist_ok=True)
    else:
        print("one")
        print("the last words", file=sys.stderr)
    sys.stdout.flush()
    note("end")
    status, ends = int(status or 0), order("ends") is not None
    if status < 0:
        os.kill(os.getpid(), -status)
    answer = {"name": job["name"], "status": status, "seconds": 100.0, "ends": ends}
    print(json.dumps(answer), file=answers)
    if ends:
        break
"""

YAML = """
title: stand
defaults: {data: PACS, weights: none, preset: course-template, mode: random, layers: 1, epochs: 1}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1]
tables:
  one:
    title: One
    baseline: r0.0
    grid:
      p_zero: [%s]
    name: r{p_zero}
"""

ROW = {
    "epoch": 1, "train_loss": 1.0, "source_train_correct": 1, "source_train_total": 2, "lr": 0.1,
    "train_seconds": 60.0, "seconds": 90.0, "updates": 1, "skipped": 0, "passes": 1, "run": "a run", "versions": {}, "fired": {}, "density": {},
    "bn_untouched": None, "tests": {},
}  # fmt: skip
CONFUSION = [[1, 1, 0, 0, 0, 0, 0], *[[0] * 7] * 6]  # 1 of 2


def write(path, value):
    path.write_text(json.dumps(value))


class Stand:
    """A suite of `trainings` trainings, each of one evaluation, made by PROGRAM.

    Attributes:
        words: arguments for `main`.
        out: the suite's folder.
        plan: what the suite expands to.
        names: of its trainings.
    """

    def __init__(self, folder: Path, monkeypatch, trainings: int, device: str = "cpu") -> None:
        self.orders, self.out = folder / "orders", folder / "suites" / "out"
        self.orders.mkdir()
        path, program = folder / "stand.yaml", folder / "program.py"
        program.write_text(PROGRAM)
        path.write_text(YAML % ", ".join(str(i / 100) for i in range(trainings // 2)))
        self.words = [str(path), "--out", str(self.out), "--set", f"device={device}"]
        words = (sys.executable, "-S", str(program), str(self.orders))
        monkeypatch.setattr(local, "COMMAND", words)
        # its records are too poor for the audit; whether they are audited is tested with true ones
        monkeypatch.setattr(sweeping, "check", lambda _: [])
        self.plan = expanded(str(path), device=device)
        self.names = [job.name for job in self.plan.jobs]
        for job in self.plan.jobs:
            self.record(job)

    def main(self, *more) -> int:
        with on_paper():
            return command.main([*self.words, *more])

    def record(self, job) -> None:
        """What the stand-in leaves of a training."""
        place = self.orders / self.key(job) / "record"
        (place / EVALUATIONS).mkdir(parents=True)
        training = {"version": VERSION, "key": job.key, "weights_digest": job.name, "epochs": 1}
        write(place / TRAINING, training | {"switches": {}})
        (place / METRICS).write_text(json.dumps(ROW) + "\n")
        for test in job.tests:
            values = test.model_dump() | {
                "name": test.name,
                "training": job.key,
                "version": VERSION,
            }
            values |= {"weights_digest": job.name, "epoch": 1, "digest": "", "counts": []}
            values |= {"classes": DATA.classes, "confusion": CONFUSION, "versions": {}}
            values |= {
                "loss": 1.0,
                "batch_loss": 0.1,
                "predictions": "",
                "features": "",
                "seconds": 1.0,
            }
            values |= figures(CONFUSION, DATA.classes)
            write(place / EVALUATIONS / f"{test.name}.json", values)
            (place / EVALUATIONS / f"{test.name}.npz").touch()

    @staticmethod
    def key(job) -> str:
        return f"{job.values['p_zero'][0]}-{job.values['seed']}"

    def tell(self, what: str, value, *names: str) -> None:
        """Order the trainings called `names`, or all; None takes an order back."""
        for job in self.plan.jobs:
            if job.name in names or not names:
                path = self.orders / self.key(job) / what
                path.unlink(missing_ok=True) if value is None else path.write_text(str(value))

    def events(self) -> list[tuple[str, ...]]:
        """(start or end, training, visible GPU, threads, process), in order of time."""
        path = self.orders / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        names = {self.key(job): job.name for job in self.plan.jobs}
        rows = sorted((float(words[0]), *words[1:]) for words in map(str.split, lines))
        return [(event, names[key], *rest) for _, event, key, *rest in rows]

    @property
    def started(self) -> Counter:
        """How often each training was started."""
        return Counter(name for event, name, *_ in self.events() if event == "start")

    @property
    def ended(self) -> Counter:
        return Counter(name for event, name, *_ in self.events() if event == "end")

    @property
    def processes(self) -> set[str]:
        return {process for *_, process in self.events()}

    def most_at_once(self, gpu: str | None = None) -> int:
        now = most = 0
        for event, _, where, *_ in self.events():
            if gpu in (None, where):
                now += 1 if event == "start" else -1
                most = max(most, now)
        return most

    @property
    def done(self) -> set[str]:
        return {name for name in self.names if (self.out / name / TRAINING).exists()}

    def failure(self, name: str) -> list[str] | None:
        with contextlib.suppress(files.RecordError):
            return files.read_json(self.out / name / "failure.json")["lines"]
