"""Runs everything that needs a GPU in one command, with one result file.

    python benchmarks/gpu.py [--out FILE] [--budget SECONDS]

It builds the kernels if they are missing and runs all tests marked gpu. Then it runs a few of them under compute-sanitizer, if
that is installed, and the timings of gpu_speed.py. The file is replaced as a whole after every result, so that a kill loses
nothing. Each part has a share of the budget. A part that takes longer is cut, and the file says so.

Exit status: 1 if a test fails, if compute-sanitizer reports an error in fastshape or if either did not finish; 2 without a GPU;
else 0.
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
    """The results so far, which are in a file at all times.

    Args:
        path: the file.
        about: device, versions, commit and date.
        goals: makes the list of goals from all records.
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
    """The number of tests by outcome, and the number of errors that compute-sanitizer reports in our kernels."""
    outcomes = [r["outcome"] for r in records if r["kind"] == "test"]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "error", "skipped")}
    errors = sum(r["errors_in_fastshape"] for r in records if r["kind"] == "sanitizer")
    return {**counts, "sanitizer_errors": errors}


def exit_status(summary: dict, parts: dict[str, dict]) -> int:
    """0 or 1, as the top of this file says."""
    failures = summary["failed"] or summary["error"] or summary["sanitizer_errors"]
    states = {name: parts.get(name, {}).get("state") for name in ("tests", "sanitizer")}
    finished = summary["passed"] and states["tests"] == "done"
    finished = finished and states["sanitizer"] in ("done", "skipped")
    return 0 if finished and not failures else 1


# ---- device and versions ----


def _words(*command: str) -> str | None:
    """The output of a command; None if it does not exist or fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except OSError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def facts(budget: float, commit: str | None) -> dict:
    """Device, versions, commit, date.

    Args:
        commit: the commit to record if the code is not in a git checkout.
    """
    import torch

    device = torch.cuda.get_device_properties(0)
    changes = _words("git", "status", "--porcelain", "--untracked-files=no")
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
        "dirty": None if changes is None else bool(changes),
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
    """The environment of a child process. This checkout comes before an installed fastshape."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run(command: list[str], limit: float, add: Callable[[dict], None], **variables: str) -> dict:
    """Run a command and pass its records on as they appear.

    Args:
        command: the word "RECORDS" is replaced by the name of a file, to which the process appends lines of JSON.
        limit: seconds after which the process and all its children are killed.
        add: gets each record.
        variables: additional environment variables.

    Returns:
        dict: ``state`` ("done", "cut" at the limit, or "failed" with a nonzero exit status), ``exit``, the exit status, and
        ``output``, the last 4000 characters.
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
                    pass  # no process of the group is left
                child.wait()
        state = "cut" if not in_time else "failed" if child.returncode else "done"
        text = log.read_text(errors="replace")
        return {"state": state, "exit": child.returncode, "output": text[-4000:]}


def end_children_on_sigterm() -> None:
    """Make SIGTERM end this process in the ordinary way, so that `run` kills its child."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


# ---- the parts: each takes a limit in seconds and a function that adds a record, and returns its outcome ----


def build(limit: float, add: Callable[[dict], None]) -> dict:
    """Build the kernels if there are none for this torch. Nothing is downloaded."""
    missing = _ask("from fastshape.backends import cuda; print(cuda.error() or '')")
    outcome = {"state": "done", "reason": "the CUDA kernels exist"}
    if missing:
        if tools := missing_tools():
            outcome = {"state": "failed", "reason": f"building needs {' and '.join(tools)}"}
        else:
            install = "-m pip install --quiet --no-build-isolation --no-deps -e".split()
            outcome = run([sys.executable, *install, str(ROOT)], limit, add)
            outcome["reason"] = f"before: {missing}"
    # If the build failed, another backend serves CUDA; the record says which and why.
    info = _ask("import json, fastshape; print(json.dumps(fastshape.backend_info()))")
    try:
        return {**outcome, "backend": json.loads(info)}
    except ValueError:
        return {"state": "failed", "reason": f"fastshape cannot be imported: {info}"}


OLDEST_SETUPTOOLS = 77  # as in pyproject.toml


def missing_tools() -> list[str]:
    """What a build needs and this Python lacks. Each item names a package and, if it is too old, its version."""
    tools = [name for name in ("setuptools", "pybind11") if not importlib.util.find_spec(name)]
    version = _version("setuptools")
    if version and int(re.match(r"\d+", version)[0]) < OLDEST_SETUPTOOLS:
        tools.append(f"setuptools>={OLDEST_SETUPTOOLS}, not {version}")
    return tools


def _ask(code: str) -> str:
    """The output of a Python process, or the end of its error output."""
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    return (process.stdout if process.returncode == 0 else process.stderr[-1000:]).strip()


def tests(limit: float, add: Callable[[dict], None]) -> dict:
    return run([sys.executable, str(HERE / "gpu_tests.py"), "RECORDS"], limit, add)


# These few tests run every kernel: aligned and unaligned maps, whole tiles and tails, and BatchNorm in each dtype, memory format
# and mask.
KERNEL_TESTS = ROOT / "tests" / "kernels"
SANITIZED = (
    str(KERNEL_TESTS / "test_cuda.py"),
    str(KERNEL_TESTS / "test_cuda_batch_norm.py"),
    "-k",
    "small or test_pack_random or test_pack_top or test_backward or (test_forward and not misaligned)",
)
# racecheck looks for races in shared memory, which pack_top alone has.
CHECKS = ("memcheck", "initcheck", "synccheck", "racecheck")


def sanitize(limit: float, add: Callable[[dict], None]) -> dict:
    """Run a few tests under each check of compute-sanitizer.

    Returns:
        dict: ``state`` is "failed" or "cut" if that is the state of a check. A check whose log has no end failed.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        return {"state": "skipped", "reason": "no compute-sanitizer on PATH or in /usr/local/cuda"}
    end, states = time.monotonic() + limit, []
    for left, check in zip(range(len(CHECKS), 0, -1), CHECKS, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            log, records = Path(folder, "log"), []
            command = [tool, "--tool", check, "--log-file", str(log)]
            command += [sys.executable, str(HERE / "gpu_tests.py"), "RECORDS", *SANITIZED]
            # Give every tensor an allocation of its own. Otherwise reads after its end stay within torch's cache.
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            outcome = run(command, (end - time.monotonic()) / left, records.append, **own)
            text = log.read_text(errors="replace") if log.is_file() else ""
        counts = {name: count for name, count in summary(records).items() if count}
        log_counts = read_sanitizer(text)
        if outcome["state"] == "done" and (log_counts["errors"] is None or "passed" not in counts):
            outcome["state"] = "failed"
        add({"kind": "sanitizer", "tool": check, **outcome, "tests": counts, **log_counts})
        states.append(outcome["state"])
    worst = next((state for state in ("failed", "cut") if state in states), "done")
    return {"state": worst, "reason": ", ".join(map("{} {}".format, CHECKS, states))}


def read_sanitizer(log: str) -> dict:
    """Read the log of compute-sanitizer.

    Returns:
        dict: ``errors``, the number of errors, or None if the log has no end; ``errors_in_fastshape``, the number of reports so
        far that name our kernels or calls; and ``reports``, the first few of these. If there are none and the log has no end,
        ``reports`` has its last lines.
    """
    paragraphs = re.split(r"^=========\s*\n", log, flags=re.MULTILINE)
    ours = [text for text in paragraphs if re.search(r"fastshape(::|4)cuda", text)]
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ", log)
    reports = [text[:2000] for text in ours[:5]]
    return {
        "errors": None if total is None else int(total[1]),
        "errors_in_fastshape": len(ours),
        "reports": reports if total or reports else [log[-2000:]],
    }


def speed(limit: float, add: Callable[[dict], None]) -> dict:
    # The script stops by itself between two measurements. The longest measurement takes half a minute.
    stop = max(limit - 30, limit / 2)
    return run([sys.executable, str(HERE / "gpu_speed.py"), "RECORDS", str(stop)], limit, add)


# The largest share of the budget for each part. The last part gets what is left.
PARTS = {
    "build": (0.1, build),
    "tests": (0.45, tests),
    "sanitizer": (0.25, sanitize),
    "speed": (1, speed),
}


def run_parts(result: Result, budget: float, parts: dict[str, tuple[float, Callable]]) -> None:
    """Run the parts in order, each within its share of the budget and within the rest of it."""
    end = time.monotonic() + budget
    for name, (share, part) in parts.items():
        start = time.monotonic()
        limit = min(share * budget, end - start)
        if limit <= 0:
            outcome = {"state": "cut", "reason": f"the budget of {budget:.0f} s was used up"}
        else:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            try:
                outcome = part(limit, result.add)
            except Exception as error:  # the next parts may still succeed
                outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
        times = {"seconds": round(time.monotonic() - start, 1), "limit_s": round(max(limit, 0), 1)}
        result.parts[name] = outcome | times
        result.save()
        print(f"{name}: {outcome['state']} in {times['seconds']} s {outcome.get('reason', '')}")
        if outcome["state"] == "failed":
            print(outcome.get("output", ""))


def report(result: Result) -> None:
    """Print failures, missed goals and the summary."""
    for record in result.records:
        if record["kind"] == "test" and record["outcome"] in ("failed", "error"):
            print(f"{record['outcome']}: {record['name']}\n{record['message'][-1000:]}")
    goals = result._goals(result.records)
    for goal in goals:
        if goal["reached"] is not True:
            state = "not measured" if goal["measured"] is None else f"missed, {goal['measured']}"
            print(f"{goal['what']}: {state} (goal: {goal['goal']})")
    print(f"{sum(g['reached'] is True for g in goals)} of {len(goals)} goals reached")
    print(", ".join(f"{count} {name}" for name, count in summary(result.records).items()))
    print(result.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds for all parts (default: 540)"
    )
    parser.add_argument("--commit", help="the commit to record if there is no git checkout")
    arguments = parser.parse_args()
    import torch  # after parsing, because the import takes seconds

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
