"""`python -m fastkl.vae train`: the same command line as `fastkl train`, in the form that torchrun needs."""

import sys

from fastkl.vae.cli import main

if __name__ == "__main__":
    sys.exit(main())
