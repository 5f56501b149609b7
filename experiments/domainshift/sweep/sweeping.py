"""Running a suite as the flags of suite.py ask: its plan, its trainings, and what becomes of each."""

from __future__ import annotations

import os
import shlex
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from domainshift import files
from domainshift.config import pick_device
from domainshift.errors import SuiteError
from domainshift.lease import Busy, Lease, take
from domainshift.methods import load_method_file
from domainshift.progress import Screen
from domainshift.records.results import read_evaluation
from domainshift.records.schema import (
    CHECKPOINT,
    FAILURE,
    SUITE,
    ClaimIndex,
    SuiteIndex,
    TrainingIndex,
)
from domainshift.records.validate import check
from domainshift.sweep import state
from domainshift.sweep.cluster import Cluster
from domainshift.sweep.estimate import RATES, Clock, duration
from domainshift.sweep.local import Failure, Local, Task, slots
from domainshift.sweep.plan import OWN, Job, Plan, chosen, expand, known_switches
from domainshift.sweep.schema import known_suites, read_suite
from domainshift.sweep.state import DONE, NEW, OTHER, RETRAIN, State, make_room, state_of

if TYPE_CHECKING:
    from jsonargparse import Namespace

BAD_INPUT, FAILED = 2, 1  # exit statuses


# --- what the flags ask for -------------------------------------------------------------------


def forced_switches(flags: Namespace) -> dict[str, Any]:
    """The switches that --data, --weights and --set give to every training."""
    values = {name: flags[name] for name in ("data", "weights") if flags[name]}
    pairs = [word.partition("=") for word in flags.set or ()]
    values |= {name.replace("-", "_"): value for name, _, value in pairs}
    if "method_file" in values:  # its method has switches too
        load_method_file(Path(values["method_file"]))
    known = known_switches()
    for name, equals, value in pairs:
        if not equals or name.replace("-", "_") not in known:
            allowed = ", ".join(n for n in known if n not in OWN)
            raise SuiteError(
                f"--set: {name + equals + value!r} is not allowed; allowed: SWITCH=VALUE with one of "
                f"{allowed}"
            )
    return values


def whole_command(flags: Namespace) -> str:
    """The command that makes the whole suite, without what says where and how much of it."""
    words = ["python", "experiments/suite.py", flags.suite, "--profile", flags.profile]
    for name in ("data", "weights"):
        words += [f"--{name}", flags[name]] if flags[name] else []
    for word in flags.set or ():
        words += ["--set", word]
    return shlex.join(words)


def pool_of(flags: Namespace, device: str | None) -> Local | Cluster:
    """Where the trainings go. Raises SuiteError."""
    if device not in (None, "auto", "cpu", "cuda"):
        raise SuiteError(
            f"--set device: {device!r} is not allowed; allowed: auto | cpu | cuda. "
            "CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
    per_device = flags.per_device or 1
    if flags.ray_address:
        if flags.jobs:
            raise SuiteError("--jobs is for one machine; on a cluster Ray counts CPUs and GPUs")
        return Cluster(flags.ray_address, per_device, {"cpu": False, "cuda": True}.get(device))
    # a dry run on a laptop tells how long a GPU would take
    planned = flags.dry_run and device == "cuda"
    kind = "cuda" if planned else pick_device(device or "auto").type
    if kind == "cpu" and flags.per_device:
        raise SuiteError("--per-device is for GPUs, and there is none in use; use --jobs")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count() or 1 if kind == "cuda" else 0
    return Local(
        kind, slots(kind, jobs=flags.jobs, per_device=per_device, gpus=gpus, cores=cores or 1)
    )


# --- the trainings -----------------------------------------------------------------------------


class Sweep:
    """The trainings of a suite, and what becomes of each.

    Args:
        out: folder of the suite.
        plan: of the whole suite.
        jobs: what --only leaves of it.
        keep: whether the checkpoints of finished trainings stay.
    """

    def __init__(
        self, out: Path, plan: Plan, jobs: Sequence[Job], clock: Clock, keep: bool, screen: Screen
    ) -> None:
        self.out, self.plan, self.jobs = out, plan, jobs
        self.clock, self.keep, self.screen = clock, keep, screen
        self.states = {job.name: state_of(out / job.name, job) for job in plan.jobs}
        self.todo = [job for job in jobs if self.states[job.name].kind != DONE]
        self.waiting = deque(self.todo)
        self.running: dict[str, tuple[Job, State]] = {}  # with what the folder held before
        self.leases: dict[str, Lease] = {}  # of the folders of running trainings
        self.busy: set[str] = set()  # those that another process was seen at
        self.failures: dict[str, Failure] = {}
        self.count = 0

    def progress(self) -> str:
        """How many trainings and evaluations are done."""
        done = [job for job in self.jobs if self.states[job.name].kind == DONE]
        tests, all_tests = (len(self.plan.evaluations(jobs)) for jobs in (done, self.jobs))
        return f"{len(done)} of {len(self.jobs)} trainings, {tests} of {all_tests} evaluations done"

    def show(self) -> None:
        """What a dry run shows: each training with its state, its time and its tests."""
        for job in self.jobs:
            kind, why = self.states[job.name]
            seconds = "" if kind == DONE else duration(self.clock.seconds(job))
            tests = ", ".join(test.name for test in job.tests)
            line = f"{kind:<8}  {seconds:>8}  {job.name}  ({tests})"
            self.screen.say(f"{line}  {why}" if why else line)

    def run(self, pool: Local | Cluster) -> None:
        """Make trainings until none is left. After an error or an interrupt, none goes on."""
        for job in self.jobs:
            if (
                self.states[job.name].kind == DONE
            ):  # by a process that was killed before it could say so
                (self.out / job.name / FAILURE).unlink(missing_ok=True)
        try:
            while self.waiting or self.running:
                for _ in range(len(self.waiting)):
                    if not pool.room():
                        break
                    self.begin(self.waiting.popleft(), pool)
                for ended in pool.finished(0.5):
                    self.end(*ended)
        finally:
            pool.stop()
            for lease in self.leases.values():
                lease.release()

    def begin(self, job: Job, pool: Local | Cluster) -> None:
        """Give a training to the pool, unless another process is at it or has made it."""
        folder = self.out / job.name
        folder.mkdir(exist_ok=True)
        try:
            lease = take(folder)
        except Busy as error:
            if job.name not in self.busy:
                self.screen.say(f"{error}; waiting for it")
                self.busy.add(job.name)
            self.waiting.append(job)
            return
        before = state_of(folder, job)
        if before.kind in (DONE, OTHER):
            failure = Failure(BAD_INPUT, [before.why]) if before.kind == OTHER else None
            self.close(job, failure, "by another process")
            lease.release()
            return
        if why := make_room(folder, before):
            self.screen.warn(f"{job.name} is trained again: {why}")
        self.running[job.name], self.leases[job.name] = (job, before), lease
        tests = [test.model_dump() for test in job.tests]
        pool.start(Task(job.name, job.values, tests, folder, lease))

    def end(self, task: Task, failure: Failure | None, seconds: float) -> None:
        job, before = self.running.pop(task.name)
        failure = failure or self.fault(job)
        if failure is None and before.kind in (NEW, RETRAIN):
            self.clock.learn(task.folder, job, seconds)
        self.close(job, failure, f"{seconds:.0f} s")
        self.leases.pop(task.name).release()

    def fault(self, job: Job) -> Failure | None:
        """What is wrong with the records that a training left; None: nothing."""
        folder = self.out / job.name
        kind, why = state_of(folder, job)
        if kind != DONE:
            return Failure(0, [f"it ended well, but left no whole record {why}".rstrip()])
        lines = check(folder)
        return Failure(0, lines) if lines else None

    def close(self, job: Job, failure: Failure | None, how: str) -> None:
        """Enter how a training ended, and say it."""
        folder = self.out / job.name
        self.count += 1
        line, style = f"[{self.count:{len(str(len(self.todo)))}}/{len(self.todo)}] {job.name}", ""
        if failure is None:
            self.states[job.name] = State(DONE)
            (folder / FAILURE).unlink(missing_ok=True)
            if not self.keep:  # 90 MB, and hundreds of trainings would fill a disk
                (folder / CHECKPOINT).unlink(missing_ok=True)
            line += f"  {accuracies(folder, job)}  {how}"
        else:
            self.failures[job.name] = failure
            files.write_json(folder / FAILURE, failure._asdict())
            line, style = f"{line}  FAILED: {(failure.lines or ['no word'])[-1]}", "bold red"
        if left := [*self.waiting, *(job for job, _ in self.running.values())]:
            line += f"  {len(left)} to go, about {duration(self.clock.left(left))}"
        self.screen.say(line, style)


def accuracies(folder: Path, job: Job) -> str:
    """The figures of a training's tests of other domains."""
    records = [read_evaluation(folder, t.name) for t in job.tests if t.images == "all"]
    return ", ".join(f"{r.name} {r.accuracy:.2f} % ({r.correct}/{r.total})" for r in records)


def run_suite(flags: Namespace, screen: Screen) -> int:
    """What the flags ask for. Returns the exit status: 0, or 1 if a training failed. Raises BadInput."""
    if flags.suite is None:
        raise SuiteError(f"suite: a name is needed; there are {', '.join(known_suites())}")
    suite = read_suite(flags.suite).in_profile(flags.profile)
    forced = forced_switches(flags)
    pool = pool_of(flags, forced.pop("device", None))
    try:
        plan = expand(suite, forced, pool.device)
        jobs = chosen(plan, flags.only)
        name = Path(flags.suite).stem
        out = Path(flags.out or Path("runs") / "suites" / f"{name}-{flags.profile}")
        share = 1 / (flags.per_device or 1) if pool.device == "cuda" else pool.threads
        clock = Clock(out.parent / RATES, pool.device, pool.device_name, share, pool.size)
        sweep = Sweep(out, plan, jobs, clock, flags.keep_checkpoints, screen)
        index = SuiteIndex(
            suite=name,
            profile=flags.profile,
            title=suite.title,
            command=whole_command(flags),
            primary=suite.primary,
            margin=suite.margin,
            claims={number: ClaimIndex(**c.given()) for number, c in suite.claims.items()},
            tables=plan.tables,
            trainings={
                job.name: TrainingIndex(key=job.key, switches=job.values, tests=job.tests)
                for job in plan.jobs
            },
        )
        state.check_folder(out, index, sweep.states.values())
        for warning in plan.warnings:
            screen.warn(warning)
        if flags.dry_run:
            sweep.show()
        left = duration(clock.left(sweep.todo, imports=True))
        screen.say(
            f"{name}, profile {flags.profile}: {sweep.progress()}; {len(sweep.todo)} trainings to do, "
            f"{pool.size} at a time on {pool.device}; about {left} ({clock.basis(sweep.todo)})"
        )
        if flags.dry_run:
            return 0
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SuiteError(f"out: cannot make folder {out}: {error.strerror}") from None
        files.write_json(out / SUITE, index.model_dump(mode="json"))
        sweep.run(pool)
    finally:
        pool.stop()
    screen.say(f"{sweep.progress()}: {out / SUITE}")
    for name, failure in sweep.failures.items():
        screen.say(f"failed: {name} ({out / name / state.LOG})", "bold red")
        for line in failure.lines:
            screen.say(f"    {line}")
    return FAILED if sweep.failures else 0
