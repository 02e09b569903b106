"""`python -m mlflow_llmbench` is the command `llmbench`, without an installation; MLproject calls it so."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
