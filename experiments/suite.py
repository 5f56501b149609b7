"""Run a suite: every evaluation of a study. See domainshift.sweep.command."""

import sys

from domainshift.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
