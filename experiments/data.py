"""Check or fetch a data set. See domainshift.data.command."""

import sys

from domainshift.data.command import main

if __name__ == "__main__":
    sys.exit(main())
