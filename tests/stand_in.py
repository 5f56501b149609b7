"""A stand-in for run.py, to test how runs are scheduled: it sleeps, fails or leaves a record as told."""

import sys
from collections import Counter
from pathlib import Path

import record
import suite
import workers

# Started without site-packages, so in some 20 ms. Its first argument is the folder with its orders.
PROGRAM = """
import os, shutil, signal, sys, time
from pathlib import Path
orders, words = Path(sys.argv[1]), sys.argv[2:]
value = lambda option: words[words.index(option) + 1]
key = f"{value('--p-zero')}-{value('--seed')}"
def note(event):
    line = f"{time.monotonic()} {event} {key} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\\n"
    descriptor = os.open(orders / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
def order(what):
    path = orders / key / what
    return path.read_text() if path.exists() else None
note("start")
time.sleep(float(order("sleep") or 0))
if (status := order("fail")) is not None:
    print("one")
    print("the last words", file=sys.stderr, flush=True) if status == "3" else None
    note("end")
    os.kill(os.getpid(), -int(status)) if int(status) < 0 else sys.exit(int(status))
out = Path(value("--out"))
for name in ("config.yaml", "metrics.jsonl", "summary.json"):
    shutil.copy(orders / key / name, out / name)
note("end")
"""

YAML = """
title: stand
defaults: {data: toy, mode: random, layers: 1}
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
profiles: {full: {}}
"""


class Stand:
    """A suite of `runs` runs, executed by PROGRAM.

    Attributes:
        words: arguments for suite.main.
        out: its folder.
        plan: what the suite expands to.
        names: of its runs.
    """

    def __init__(self, folder: Path, monkeypatch, runs: int, device: str = "cpu") -> None:
        self.orders, self.out = folder / "orders", folder / "out"
        self.orders.mkdir()
        path, program = folder / "stand.yaml", folder / "program.py"
        program.write_text(PROGRAM)
        path.write_text(YAML % ", ".join(str(i / 100) for i in range(runs // 2)))
        self.words = [str(path), "--out", str(self.out), "--set", f"device={device}"]
        command = (sys.executable, "-S", str(program), str(self.orders))
        monkeypatch.setattr(workers, "COMMAND", command)
        # its records are too poor to be checked; whether checks happen is tested with true runs
        monkeypatch.setattr(suite.record, "check", lambda _: [])
        content = suite.in_profile(suite.read_suite(str(path)), "full")
        self.plan = suite.expand(content, {}, device)
        self.names = [run.name for run in self.plan.runs]
        for run in self.plan.runs:
            place = self.orders / self.key(run)
            place.mkdir()
            record.write_yaml(place / "config.yaml", run.config.as_dict())
            record.write_json_lines(place / "metrics.jsonl", [{"epoch": 1}])
            figures = {"target_accuracy": 50.0, "target_correct": 1, "target_total": 2}
            record.write_json(place / "summary.json", figures | {"seconds": 1000.0})

    @staticmethod
    def key(run) -> str:
        return f"{run.config.p_zero[0]}-{run.config.seed}"

    def tell(self, what: str, value, *names: str) -> None:
        """Order the runs called `names`, or all; None takes an order back."""
        for run in self.plan.runs:
            if run.name in names or not names:
                path = self.orders / self.key(run) / what
                path.unlink(missing_ok=True) if value is None else path.write_text(str(value))

    def events(self) -> list[tuple[str, str, str]]:
        """(start or end, run, visible GPU), in order of time."""
        path = self.orders / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        names = {self.key(run): run.name for run in self.plan.runs}
        rows = sorted((float(words[0]), *words[1:]) for words in map(str.split, lines))
        return [(event, names[key], gpu) for _, event, key, gpu in rows]

    @property
    def started(self) -> Counter:
        """How often each run was started."""
        return Counter(name for event, name, _ in self.events() if event == "start")

    @property
    def ended(self) -> Counter:
        return Counter(name for event, name, _ in self.events() if event == "end")

    def most_at_once(self, gpu: str | None = None) -> int:
        now = most = 0
        for event, _, where in self.events():
            if gpu in (None, where):
                now += 1 if event == "start" else -1
                most = max(most, now)
        return most
