"""Public import path of `measure`: time a generate function of your own. See `workflows.in_process`."""

from .workflows.in_process import measure

__all__ = ["measure"]
