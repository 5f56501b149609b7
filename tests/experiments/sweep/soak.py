"""A suite among accidents: `make soak`, ten minutes, not part of the tests.

One small suite runs undisturbed. Then it runs again and again while its workers and the suite itself are
killed and stopped, the disk is full, clocks jump, the data cannot be written to and, once, a node of a Ray
cluster is lost. After each round every record must be whole, each training must be there once, and all
must equal the undisturbed ones. The last lines are a table of what happened. Exit status 1: a fault.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(HERE), str(HERE.parent / "data")]

from domainshift.lease import holder  # noqa: E402
from domainshift.records.validate import check  # noqa: E402
from made_folders import make_pacs  # noqa: E402
from small_suites import TRUE, result_of, small  # noqa: E402

DISK = 64  # MiB, of the suite's folder; a checkpoint has 3
CLOCK = """
import os, time
_time = time.time

def jumping():
    try:
        with open(os.environ["SOAK_CLOCK"]) as file:
            return _time() + float(file.read() or 0)
    except (OSError, ValueError):
        return _time()

time.time = jumping
"""


def mounted(*words: str) -> bool:
    """Whether `mount` with these arguments went well; it needs a superuser."""
    try:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class Soak:
    """The suite, its folders and its accidents.

    Args:
        root: an empty folder.
        seed: of the accidents.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance, self.events = root, random.Random(seed), Counter()
        self.data, self.disk, self.clock = root / "data", root / "disk", root / "clock"
        make_pacs(self.data)
        self.disk.mkdir()
        self.small_disk = mounted("-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(self.disk))
        read_only = mounted("--bind", str(self.data), str(self.data))
        self.read_only = read_only and mounted("-o", "remount,ro,bind", str(self.data))
        (root / "patch").mkdir()
        (root / "patch" / "sitecustomize.py").write_text(CLOCK)
        defaults = TRUE["defaults"] | {"data": str(self.data), "limit": 2}
        self.path = small(root, **TRUE | {"defaults": defaults, "seeds": [0, 1, 2, 3]})
        self.faults: list[str] = []

    def close(self) -> None:
        for place in (self.disk, self.data):
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)

    def start(self, out: Path, *words: str) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(self.root / "patch"),
            "SOAK_CLOCK": str(self.clock),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(EXPERIMENTS / "suite.py"), self.path, "--out", str(out)]
        with open(self.root / "log.txt", "ab") as log:
            return subprocess.Popen([*command, *words], env=environment, stdout=log, stderr=log)

    # --- accidents --------------------------------------------------------------------------------

    def workers(self, suite: subprocess.Popen) -> list[int]:
        path = Path(f"/proc/{suite.pid}/task/{suite.pid}/children")
        with suppress(OSError):
            return [int(word) for word in path.read_text().split()]
        return []

    def signal_worker(self, suite: subprocess.Popen, number: signal.Signals) -> int | None:
        if not (workers := self.workers(suite)):
            return None
        worker = self.chance.choice(workers)
        with suppress(ProcessLookupError):
            os.kill(worker, number)
            self.events[f"worker got {number.name}"] += 1
        return worker

    def accident(self, suite: subprocess.Popen) -> None:
        kind = self.chance.choice(["kill", "kill", "suite", "interrupt", "disk", "clock", "stop"])
        if kind == "kill":
            self.signal_worker(suite, signal.SIGKILL)
        elif kind == "stop" and (worker := self.signal_worker(suite, signal.SIGSTOP)):
            time.sleep(2)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        elif kind in ("suite", "interrupt"):
            number = signal.SIGKILL if kind == "suite" else signal.SIGTERM
            suite.send_signal(number)
            self.events[f"suite got {number.name}"] += 1
        elif kind == "clock":
            self.clock.write_text(str(self.chance.choice([0, -86400, 86400, 3e8, -3e8])))
            self.events["clock jumped"] += 1
        elif kind == "disk" and self.small_disk:
            ballast = self.disk / "ballast"
            with suppress(OSError), open(ballast, "wb") as file:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            self.events["disk was full"] += 1
            time.sleep(self.chance.uniform(1, 3))
            ballast.unlink(missing_ok=True)

    # --- rounds -----------------------------------------------------------------------------------

    def undisturbed(self) -> Path:
        out = self.root / "undisturbed"
        if status := self.start(out, "--jobs", "2").wait():
            raise SystemExit(f"the undisturbed suite ended with {status}: see {self.root}/log.txt")
        return out

    def round(self, number: int, expected: Path, end: float) -> None:
        """The suite from the beginning, among accidents until `end`, and to its end."""
        out = self.disk / f"round-{number}"
        for attempt in range(1000):
            suite = self.start(out, "--jobs", "2")
            while suite.poll() is None:
                time.sleep(self.chance.uniform(0.5, 5))
                if time.monotonic() < end and suite.poll() is None:
                    self.accident(suite)
            if suite.returncode == 0:
                break
            self.events["suite started again"] += 1
            if attempt > 3 and time.monotonic() > end + 180:
                lines = (self.root / "log.txt").read_text(errors="replace").splitlines()[-20:]
                self.faults.append("\n    ".join([f"round {number} does not end:", *lines]))
                return
        self.compare(number, out, expected)
        shutil.rmtree(out)

    def cluster(self, number: int, expected: Path) -> None:
        """The suite on a Ray cluster that loses a node."""
        try:
            import ray
            from ray.cluster_utils import Cluster
        except ImportError:
            print("Ray is not installed: no node is lost")
            return
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes.add_node(num_cpus=1)
        mortal = nodes.add_node(num_cpus=1)
        out = self.disk / f"round-{number}"
        suite = self.start(out, "--ray-address", nodes.address)
        while suite.poll() is None:
            time.sleep(1)
            trained = len(list(out.glob("*/training.json")))
            if mortal and trained >= 2:
                nodes.remove_node(mortal, allow_graceful=False)
                mortal = None
                self.events["Ray node was lost"] += 1
        nodes.shutdown()
        ray.shutdown()
        if suite.returncode:
            self.faults.append(f"the suite on Ray ended with {suite.returncode}")
        self.compare(number, out, expected)
        shutil.rmtree(out)

    def compare(self, number: int, out: Path, expected: Path) -> None:
        """Every record whole, none twice, and all equal to the undisturbed ones."""
        names = {path.parent.name for path in expected.glob("*/training.json")}
        copies = Counter(path.parent.name for path in out.rglob("training.json"))
        if copies != Counter(names):
            self.faults.append(f"round {number}: trainings {dict(copies)}, not {sorted(names)}")
            return
        for name in sorted(names):
            for problem in check(out / name):
                self.faults.append(f"round {number}, {name}: {problem}")
            if result_of(out / name) != result_of(expected / name):
                self.faults.append(f"round {number}, {name}: other figures than undisturbed")
        for path in [*out.rglob("*.part"), *out.rglob("failure.json")]:
            self.faults.append(f"round {number}: {path.relative_to(out)} was left")
        for name in names:
            if owner := holder(out / name):
                self.faults.append(f"round {number}: {name} is still in use by {owner}")
        self.events["rounds finished"] += 1
        self.events["trainings compared"] += len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="fastshape-soak-", ignore_cleanup_errors=True
    ) as folder:
        soak = Soak(Path(folder), flags.seed)
        try:
            end = time.monotonic() + 60 * flags.minutes
            expected = soak.undisturbed()
            soak.cluster(0, expected)
            number = 1
            while time.monotonic() < end:
                soak.round(number, expected, end)
                number += 1
        finally:
            soak.close()
    for what, here in (("a small disk", soak.small_disk), ("read-only data", soak.read_only)):
        if not here:
            print(f"{what}: not tried, mount needs a superuser")
    for event, count in sorted(soak.events.items()):
        print(f"{event:<24} {count:>5}")
    for fault in soak.faults:
        print(f"FAULT: {fault}")
    print(
        "faults" if soak.faults else "every record whole, none twice, all equal to the undisturbed"
    )
    return bool(soak.faults)


if __name__ == "__main__":
    sys.exit(main())
