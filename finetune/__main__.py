"""``accelerate launch -m carina.finetune RECIPE ...`` and ``torchrun -m carina.finetune RECIPE ...``."""

import sys

from carina.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
