"""Run the command `llmbench` as `python -m mlflow_llmbench`, without an installation, as MLproject does."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
