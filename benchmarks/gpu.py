"""Everything that needs a GPU, in one command and one result file.

    python benchmarks/gpu.py [--out FILE] [--budget SECONDS]

Builds the kernels where they are missing, then runs every test marked gpu, a few of them again under compute-sanitizer where
that is installed, and the timings of gpu_speed.py. The file is replaced as a whole after whatever was found out, so that a
kill leaves all until then. Each part has a share of the budget; what runs late is cut first, and the file says so.

Exit status: 1 if a test or compute-sanitizer found fastshape wrong, or the tests did not run to their end; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent

# ---- the result file ----


class Result:
    """What was found out so far, in a file at all times.

    Args:
        path: the file.
        about: what it was found out with.
        goals: makes a list of goals from all records.
    """

    def __init__(self, path: Path, about: dict, goals: Callable[[list[dict]], list[dict]]):
        self.path, self.about, self._goals = path, about, goals
        self.parts: dict[str, dict] = {}
        self.records: list[dict] = []

    def add(self, record: dict) -> None:
        self.records.append(record)
        self.save()

    def save(self) -> None:
        kinds = dict.fromkeys(record["kind"] for record in self.records)
        content = {
            "about": self.about,
            "parts": self.parts,
            "summary": summary(self.records),
            "goals": self._goals(self.records),
            **{
                kind: [
                    {k: v for k, v in r.items() if k != "kind"}
                    for r in self.records
                    if r["kind"] == kind
                ]
                for kind in kinds
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.path)


def summary(records: list[dict]) -> dict:
    """How many tests passed, failed, were skipped or broke off, and how many errors compute-sanitizer saw in our kernels."""
    outcomes = [r["outcome"] for r in records if r["kind"] == "test"]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "error", "skipped")}
    seen = sum(r["errors_in_fastshape"] or 0 for r in records if r["kind"] == "sanitizer")
    return {**counts, "sanitizer_errors": seen}


def exit_status(summary: dict, parts: dict[str, dict]) -> int:
    """0 or 1; see the top of this file."""
    wrong = summary["failed"] or summary["error"] or summary["sanitizer_errors"]
    proven = summary["passed"] and parts.get("tests", {}).get("state") == "done"
    return 0 if proven and not wrong else 1


# ---- what it was found out with ----


def _words(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def facts(budget: float, commit: str | None) -> dict:
    """Device, versions, commit, date.

    Args:
        commit: what to say where the code is not in a git checkout.
    """
    import torch

    device = torch.cuda.get_device_properties(0)
    changed = _words("git", "status", "--porcelain", "--untracked-files=no")
    query = ("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_bytes": device.total_memory,
        "L2_bytes": device.L2_cache_size,
        "multiprocessors": device.multi_processor_count,
        "driver": _words(*query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _words("git", "rev-parse", "HEAD") or commit or "unknown",
        "dirty": None if changed is None else bool(changed),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "budget_s": budget,
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- a process with a time limit ----


def environment(**more: str) -> dict[str, str]:
    """With this checkout before any fastshape that is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run(command: list[str], limit: float, add: Callable[[dict], None], **variables: str) -> dict:
    """Run a command, handing on its records as they come.

    Args:
        command: "RECORDS" in it becomes the name of a file, to which the process appends lines of JSON.
        limit: seconds after which it is killed, with all it started.

    Returns:
        dict: ``state`` ("done", or "cut" at the limit, or "failed" by its exit status), ``exit`` and ``output``, its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        records, log = Path(folder, "records"), Path(folder, "log")
        records.touch()
        command = [str(records) if word == "RECORDS" else word for word in command]
        end = time.monotonic() + limit
        unread = ""
        with log.open("wb") as output, records.open() as lines:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment(**variables), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            running = True
            try:
                while running:
                    try:
                        child.wait(timeout=0.5)
                        running = False
                    except subprocess.TimeoutExpired:
                        running = time.monotonic() < end
                    *whole, unread = (unread + lines.read()).split("\n")
                    for line in whole:
                        add(json.loads(line))
            finally:
                in_time = child.poll() is not None
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # and it has left nobody behind
                child.wait()
        state = "cut" if not in_time else "failed" if child.returncode else "done"
        text = log.read_text(errors="replace")
        return {"state": state, "exit": child.returncode, "output": text[-4000:]}


def end_children_on_sigterm() -> None:
    """Make the end of this process the end of `run`'s, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


# ---- the parts: each takes the seconds it has and where to put records, and says how it went ----


def build(limit: float, add: Callable[[dict], None]) -> dict:
    """The kernels, where they are not there yet for this torch. Nothing is fetched."""
    missing = _ask("from fastshape.backends import cuda; print(cuda.error() or '')")
    told = {"state": "done", "reason": "the CUDA kernels were there"}
    if missing:
        tools = [name for name in ("setuptools", "pybind11") if not importlib.util.find_spec(name)]
        if tools:
            told = {"state": "failed", "reason": f"building needs {' and '.join(tools)}"}
        else:
            install = "-m pip install --quiet --no-build-isolation --no-deps -e".split()
            told = run([sys.executable, *install, str(ROOT)], limit, add)
            told["reason"] = f"before: {missing}"
    # Where they could not be built, another backend serves CUDA, and here is which and why.
    info = _ask("import json, fastshape; print(json.dumps(fastshape.backend_info()))")
    try:
        return {**told, "backend": json.loads(info)}
    except ValueError:
        return {"state": "failed", "reason": f"fastshape cannot be imported: {info}"}


def _ask(code: str) -> str:
    """What a Python process prints, or the end of its error."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    return (done.stdout if done.returncode == 0 else done.stderr[-1000:]).strip()


def tests(limit: float, add: Callable[[dict], None]) -> dict:
    return run([sys.executable, str(HERE / "gpu_tests.py"), "RECORDS"], limit, add)


# Every kernel, aligned and not, whole tiles and tails.
SANITIZED = (str(ROOT / "tests" / "test_cuda.py"), "-k", "small or test_pack_random")


def sanitize(limit: float, add: Callable[[dict], None]) -> dict:
    """memcheck, initcheck and racecheck of compute-sanitizer, over a few tests."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        return {"state": "skipped", "reason": "no compute-sanitizer on PATH or in /usr/local/cuda"}
    end, checks = time.monotonic() + limit, ("memcheck", "initcheck", "racecheck")
    states = []
    for left, check in zip(range(len(checks), 0, -1), checks, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            log, seen = Path(folder, "log"), []
            command = [tool, "--tool", check, "--log-file", str(log)]
            command += [sys.executable, str(HERE / "gpu_tests.py"), "RECORDS", *SANITIZED]
            # Every tensor an allocation of its own, or what is read beyond one lies within torch's cache.
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            told = run(command, (end - time.monotonic()) / left, seen.append, **own)
            text = log.read_text(errors="replace") if log.is_file() else ""
        counts = {name: count for name, count in summary(seen).items() if count}
        add({"kind": "sanitizer", "tool": check, **told, "tests": counts, **read_sanitizer(text)})
        states.append(told["state"])
    worst = next((state for state in ("failed", "cut") if state in states), "done")
    return {"state": worst, "reason": ", ".join(map("{} {}".format, checks, states))}


def read_sanitizer(log: str) -> dict:
    """From compute-sanitizer's log.

    Returns:
        dict: ``errors``; ``errors_in_fastshape``, those that name our kernels or our calls; and the first few of these as
        ``reports``. The numbers are None, and the end of the log the report, where it came to no end.
    """
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ", log)
    if total is None:
        return {"errors": None, "errors_in_fastshape": None, "reports": [log[-2000:]]}
    paragraphs = re.split(r"^=========\s*\n", log, flags=re.MULTILINE)
    ours = [text for text in paragraphs if re.search(r"fastshape(::|4)cuda", text)]
    return {
        "errors": int(total[1]),
        "errors_in_fastshape": len(ours),
        "reports": [text[:2000] for text in ours[:5]],
    }


def speed(limit: float, add: Callable[[dict], None]) -> dict:
    # It stops by itself between two measurements, of which the longest takes half a minute.
    stop = max(limit - 30, limit / 2)
    return run([sys.executable, str(HERE / "gpu_speed.py"), "RECORDS", str(stop)], limit, add)


# Share of the budget a part has at most. The last has what is left.
PARTS = {
    "build": (0.1, build),
    "tests": (0.5, tests),
    "sanitizer": (0.2, sanitize),
    "speed": (1, speed),
}


def run_parts(result: Result, budget: float, parts: dict[str, tuple[float, Callable]]) -> None:
    """Run the parts in order, each within its share of the budget and within what is left of it."""
    end = time.monotonic() + budget
    for name, (share, part) in parts.items():
        start = time.monotonic()
        limit = min(share * budget, end - start)
        if limit <= 0:
            told = {"state": "cut", "reason": f"nothing was left of {budget:.0f} s"}
        else:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            try:
                told = part(limit, result.add)
            except Exception as error:  # the parts after it may still find something out
                told = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
        spent = {"seconds": round(time.monotonic() - start, 1), "limit_s": round(max(limit, 0), 1)}
        result.parts[name] = told | spent
        result.save()
        print(f"{name}: {told['state']} in {spent['seconds']} s {told.get('reason', '')}")
        if told["state"] == "failed":
            print(told.get("output", ""))


def report(result: Result) -> None:
    """What a person wants to see first."""
    for record in result.records:
        if record["kind"] == "test" and record["outcome"] in ("failed", "error"):
            print(f"{record['outcome']}: {record['name']}\n{record['message'][-1000:]}")
    goals = result._goals(result.records)
    for goal in goals:
        if goal["reached"] is not True:
            said = "not measured" if goal["measured"] is None else f"missed, {goal['measured']}"
            print(f"{goal['what']}: {said} (goal: {goal['goal']})")
    print(f"{sum(g['reached'] is True for g in goals)} of {len(goals)} goals reached")
    print(", ".join(f"{count} {name}" for name, count in summary(result.records).items()))
    print(result.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all (default: 600)")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    arguments = parser.parse_args()
    import torch  # after the arguments: it takes seconds

    if not torch.cuda.is_available():
        print(f"no CUDA device is visible to torch {torch.__version__}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from gpu_speed import goals

    end_children_on_sigterm()
    about = facts(arguments.budget, arguments.commit)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    result = Result(arguments.out or HERE / "results" / f"{name}.json", about, goals)
    run_parts(result, arguments.budget, PARTS)
    report(result)
    return exit_status(summary(result.records), result.parts)


if __name__ == "__main__":
    sys.exit(main())
