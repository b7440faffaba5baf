"""A small HTTP server on the loopback address, with answers that a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answers = Mapping[str, tuple[int, Any]]


@contextmanager
def answering(answers: Answers, heard: list[tuple[str, str, dict[str, str]]] | None = None) -> Iterator[str]:
    """Serve (status, body) by path, texts as they are and the rest as JSON; yields the address.

    Args:
        answers: Other paths get 404.
        heard: Gets (method, path, headers) of each request.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            if heard is not None:
                heard.append((self.command, self.path, dict(self.headers)))
            status, body = answers.get(self.path.partition("?")[0], (404, "not found"))
            payload = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
