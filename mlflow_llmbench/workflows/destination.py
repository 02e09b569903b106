"""Folder and MLflow run that keep the files of a finding."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..tracking import runs
from ..tracking.store import open_store


@dataclass(frozen=True)
class Destination:
    """Destination of files: a folder, and a run (its id or `runs:/ID`). None: they are not kept there."""

    folder: str | None = None
    run: str | None = None

    def keep(self, write: Callable[[Path], object], under: str, tracking_uri: str | None = None) -> None:
        """Let `write` write its files into the folder, and log them on the run under the path `under`.

        Raises JournalError or TrackingError.
        """
        if self.folder:
            write(Path(self.folder))
        if self.run:  # from a temporary folder: the other may hold the user's own files
            with tempfile.TemporaryDirectory() as scratch:
                write(Path(scratch))
                store = open_store(tracking_uri, reads=True)
                runs.log_folder(store, self.run.removeprefix("runs:/"), Path(scratch), under)


NOT_KEPT = Destination()
"""No destination: the files are not written."""
