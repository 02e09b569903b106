"""The command line: one module per group of commands, `main` is the entry point."""

from .main import main

__all__ = ["main"]
