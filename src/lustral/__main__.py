"""``python -m lustral`` is the command ``lustral``."""

import sys

from lustral.cli import main

if __name__ == "__main__":
    sys.exit(main())
