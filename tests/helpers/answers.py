"""Servers of a test's own on the loopback, which answer every request as the test says."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answers(BaseHTTPRequestHandler):
    """Answers by a subclass's :meth:`answer`, whatever it is asked for."""

    def answer(self) -> None:
        """Calls :meth:`say`."""
        raise NotImplementedError

    def _answer(self) -> None:
        self.answer()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_CONNECT = _answer

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Takes the request's body, and answers."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer | type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves in a thread until the end of the block; the URL. ``server``, or one that answers by this class."""
    if not isinstance(server, ThreadingHTTPServer):
        server = ThreadingHTTPServer(("127.0.0.1", 0), server)
    # How often it looks whether it is to end: twice a second by default.
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
