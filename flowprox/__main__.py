"""``python -m flowprox`` is the command ``flowprox``."""

import sys

from flowprox.cli import main

if __name__ == "__main__":
    sys.exit(main())
