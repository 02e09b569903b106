"""Run the command `llmbench` as `python -m mlflow_llmbench`, without an installation, as MLproject does."""

import sys

from .system.python_command import forget_working_directory

if __name__ == "__main__":
    forget_working_directory()  # before anything is imported that is not of the standard library

    from .cli.main import main
    from .records.invocation import MODULE

    sys.exit(main(program=MODULE))
