"""Parse server-sent events from bytes, independent of transport: WHATWG HTML standard, section 9.2.6.

Bytes may be cut anywhere, even inside a line ending or a UTF-8 sequence; the events are the same for every cut. A line
ends with CR LF, LF or CR. A blank line dispatches the event; an event without a blank line after it is never
dispatched.
"""

from __future__ import annotations

from typing import NamedTuple

BOM = b"\xef\xbb\xbf"


class ServerSentEvent(NamedTuple):
    """A dispatched event: its data (lines joined by a line feed), its type, and the last id that the stream set."""

    data: str
    type: str = "message"
    id: str = ""


class EventParser:
    """Incremental parser: takes bytes as they arrive and returns the events that they complete.

    Only whole lines are decoded, so no cut can split a character. Invalid UTF-8 becomes U+FFFD, as the standard says.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of the line that has not ended
        self._after_cr = False  # a line feed that comes next belongs to the previous line ending
        self._first = True
        self._data: list[str] = []
        self._type = ""
        self._id = ""

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Return the events that end within `data`, in order."""
        if self._after_cr and data:
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            self._after_cr = data[-1:] == b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        if len(lines) == 1:
            self._pieces.append(data)
            return []
        if self._pieces:
            self._pieces.append(lines[0])
            lines[0] = b"".join(self._pieces)
        self._pieces = [last] if (last := lines.pop()) else []
        if self._first:
            self._first = False
            lines[0] = lines[0].removeprefix(BOM)
        events: list[ServerSentEvent] = []
        for line in lines:
            if line.startswith(b"data: "):  # nearly every line
                self._data.append(line[6:].decode("utf-8", "replace"))
            elif line:
                self._field(line)
            else:
                self._dispatch(events)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value

    def _dispatch(self, events: list[ServerSentEvent]) -> None:
        if self._data:
            text = self._data[0] if len(self._data) == 1 else "\n".join(self._data)
            events.append(ServerSentEvent(text, self._type or "message", self._id))
            self._data = []
        self._type = ""
