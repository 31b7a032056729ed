"""`python -m fastkl train`: the command line of the reference VAE, as `fastkl train`."""

import sys

from fastkl.vae.cli import main

if __name__ == "__main__":
    sys.exit(main())
