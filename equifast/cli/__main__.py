"""``python -m equifast.cli`` is the command ``equifast``."""

import sys

from equifast.cli import app

if __name__ == "__main__":
    sys.exit(app())
