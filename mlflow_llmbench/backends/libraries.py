"""Heavy libraries of a backend, imported before the *baseline* stage so that no load includes their import."""

from __future__ import annotations

import importlib
import os

from .base import Capabilities


def import_libraries(declared: Capabilities, threads: int) -> None:
    """Set a backend's environment variables, import its libraries, redirect their logs, and set their threads."""
    os.environ.update(declared.variables)
    for name in declared.heavy:
        importlib.import_module(name)
    if "transformers" in declared.heavy:
        from transformers.utils import logging

        logging.disable_default_handler()
        logging.enable_propagation()
        logging.disable_progress_bar()
    if "torch" in declared.heavy:
        import torch

        torch.set_num_threads(threads)
