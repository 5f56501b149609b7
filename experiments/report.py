"""Build the report of a suite from its records. See domainshift.report.command."""

import sys

from domainshift.report.command import main

if __name__ == "__main__":
    sys.exit(main())
