"""Train on one domain and test on others. See domainshift.command."""

import sys

from domainshift.command import main

if __name__ == "__main__":
    sys.exit(main())
