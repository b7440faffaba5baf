"""A Hugging Face hub on this machine: repositories are folders, and only what its clients ask for is answered."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    """``/api/{models,datasets}/ID/...`` describes a repository, ``[/datasets]/ID/resolve/COMMIT/FILE`` gives a file."""

    def __init__(self, root: Path, *args: Any) -> None:
        self.root = root
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._describe(parts[2:])
        else:
            self._file(parts[1:] if parts[0] == "datasets" else parts)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _describe(self, parts: list[str]) -> None:
        repository = self.root / "/".join(parts[:2])
        match parts[2:]:
            case _ if not repository.is_dir():
                self._missing("RepoNotFound")
            case ["tree", _, *inner]:
                folder = repository.joinpath(*inner)
                self._json([_entry(repository, path) for path in sorted(folder.rglob("*"))])
            case [] | ["revision", _]:
                files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
                names = [{"rfilename": str(path.relative_to(repository))} for path in files]
                self._json({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": names, "private": False, "tags": []})
            case _:
                self._missing("EntryNotFound")

    def _file(self, parts: list[str]) -> None:
        path = self.root.joinpath(*parts[:2], *parts[4:])
        if parts[2:3] != ["resolve"] or not path.is_file():
            self._missing("EntryNotFound" if self.root.joinpath(*parts[:2]).is_dir() else "RepoNotFound")
            return
        self._send(path.read_bytes(), "application/octet-stream")

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(repository: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "path": name, "size": 0}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "path": name, "size": len(data)}


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serve ``root/ORGANISATION/NAME`` as repositories; gives the address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
