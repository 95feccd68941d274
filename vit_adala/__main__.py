"""`python -m vit_adala` and `accelerate launch -m vit_adala`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
