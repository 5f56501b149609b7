"""Run a suite, every training and test behind the tables of a study: the command suite.py.

    python experiments/suite.py report-b --dry-run
    python experiments/suite.py report-b --profile mini --data data/PACS --jobs 2

The same command continues a suite at any time: what is finished is skipped, what was killed goes on
from its last epoch, and the rest is made. Each training has a folder in --out, with all its tests.
suite.json beside them says which test is in which table. The report needs nothing else.
"""

from __future__ import annotations

import shlex
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from domainshift.errors import BadInput, SuiteError
from domainshift.progress import Screen, show_any_name
from domainshift.sweep.schema import FULL, documentation, known_suites, read_suite

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses, beside those of `run_suite`


def whole(text: str) -> int:
    if not str(text).isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from 1")
    return int(text)


class Help(DefaultHelpFormatter):
    def _get_help_string(self, action: Any) -> str:
        return action.help  # which names the default where there is one


def parser() -> ArgumentParser:
    result = ArgumentParser(
        prog="suite.py",
        description=(__doc__ or "").split(":")[0] + f". Suites: {listing()}.",
        epilog="suite.py --schema explains the YAML of a suite, run.py --help its switches.",
        formatter_class=Help,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = result.add_argument
    add("suite", nargs="?", help="name of a suite in experiments/suites, or a YAML file")
    add("--profile", default=FULL, help="a size of the study that the suite has (default: full)")
    add("--data", help="the same as --set data=")
    add("--weights", help="the same as --set weights=")
    add("--out", help="folder (default: runs/suites/SUITE-PROFILE)")
    add(
        "--set",
        action="append",
        metavar="SWITCH=VALUE",
        help="a switch of every training whose method has it, whatever the suite says; repeatable",
    )
    add(
        "--only",
        metavar="PATTERN",
        help="only the trainings of a table, an arm or a folder that matches this shell pattern",
    )
    add("--dry-run", action="store_true", help="list the trainings, and make none")
    add(
        "--keep-checkpoints",
        action="store_true",
        help="keep the checkpoint, 90 MB, of a finished training, so that it can be tested further",
    )
    add("--jobs", type=whole, metavar="N", help="trainings at a time (CPU: default 1)")
    add(
        "--per-device",
        type=whole,
        metavar="N",
        help="trainings at a time on a GPU (default: 1)",
    )
    add("--ray-address", metavar="ADDRESS", help="use this Ray cluster: auto, host:port")
    add("--schema", action="store_true", help="print what the YAML of a suite may hold")
    return result


def listing() -> str:
    suites = []
    for name in known_suites():
        try:
            suites.append(f"{name} ({read_suite(name).title})")
        except SuiteError as error:
            suites.append(f"{name} (cannot be used: {error})")
    return ", ".join(suites).replace("%", "%%")


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags. --help exits. Raises SuiteError."""
    try:
        return parser().parse_args(list(arguments))
    except Exception as error:  # argparse.ArgumentError, in several wrappings
        raise SuiteError(" ".join(str(error).split())) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all done, 2 bad input, 1 some trainings failed, 130 interrupted."""
    show_any_name()
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, for job schedulers
    try:
        flags = parse(arguments)
        if flags.schema:
            print(documentation())
            return 0
        from domainshift.sweep.sweeping import run_suite  # torch takes seconds to import

        return run_suite(flags, Screen())
    except BadInput as error:
        for line in str(error).splitlines():
            print(f"suite.py: error: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        again = shlex.join(["python", "experiments/suite.py", *arguments])
        print(f"suite.py: interrupted; to continue: {again}", file=sys.stderr)
        return INTERRUPTED
