"""``accelerate launch -m carina.pretrain RECIPE ...`` and ``torchrun -m carina.pretrain RECIPE ...``."""

import sys

from carina.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
