"""Run the command `llmbench` as `python -m mlflow_llmbench`, without an installation, as MLproject does."""

import sys

from .cli.main import main
from .records.invocation import MODULE

if __name__ == "__main__":
    sys.exit(main(program=MODULE))
