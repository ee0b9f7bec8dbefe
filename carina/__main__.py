"""``python -m carina``."""

import sys

from carina.cli import main

if __name__ == "__main__":
    sys.exit(main())
