"""Real servers on loopback, for tests."""

from __future__ import annotations

import http.server
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class LeavingIsNoError(socketserver.BaseServer):
    """Report no disconnected client on standard error: a thread may notice one a minute later, in another test."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class HTTPServer(LeavingIsNoError, http.server.ThreadingHTTPServer):
    """The HTTP server of the tests."""


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Yield the address of a server that answers with `handler` until the block ends; with `context` it speaks TLS."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Door:
    """A port on loopback that forwards to another one. While shut, it cuts connections and refuses new ones."""

    def __init__(self, to: int) -> None:
        self.to, self.port, self.connections = to, 0, list[socket.socket]()
        self.open()

    def open(self) -> None:
        door = self

        class Through(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", door.to)) as other:
                    door.connections += [self.request, other]
                    back = threading.Thread(target=_pass_on, args=(other, self.request), daemon=True)
                    back.start()
                    _pass_on(self.request, other)

        class Server(LeavingIsNoError, socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

        self.server = Server(("127.0.0.1", self.port), Through)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def shut(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
