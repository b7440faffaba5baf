"""A real S3 server on 127.0.0.1, and a wire to it that can be cut, held, or cut after so many bytes.

The server is moto's, a process of its own. It keeps everything in memory, so outages are made on the wire: a proxy in
this process that the addresses of `S3` lead to.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import requests

HOST = "127.0.0.1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_S = 60.0

State = Literal["up", "refused", "held"]


class Wire:
    """A TCP proxy to `target` on a port of its own."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.bytes_left: int | None = None
        """Bytes that clients may still send before the wire is cut."""
        self._state: State = "up"
        self._listener: socket.socket | None = None
        self._pairs: set[socket.socket] = set()
        self.set("up")

    def set(self, state: State) -> None:
        """`refused`: nobody listens, and what is open is cut; `held`: connections are taken, and not a byte moves."""
        before, self._state = self._state, state
        if state == "refused":
            if self._listener:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            self._cut()
        elif self._listener is None:
            self._listener = socket.create_server((HOST, self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        if before == "held":
            self._cut()  # who waited begins anew

    def close(self) -> None:
        """End it."""
        self.set("refused")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((HOST, self.target))
            self._pairs |= {client, server}
            for source, sink, counted in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._carry, args=(source, sink, counted), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self._state == "held":
                    time.sleep(0.02)
                if counted and self.bytes_left is not None:
                    self.bytes_left -= len(data)
                    if self.bytes_left <= 0:
                        self.bytes_left = None
                        self.set("refused")
                        return
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        for end in list(self._pairs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._pairs.clear()


@dataclass
class S3:
    """A server, and the wire to it."""

    process: subprocess.Popen[bytes]
    port: int
    wire: Wire
    buckets: list[str] = field(default_factory=list)

    def bucket(self) -> str:
        """A new one, empty."""
        name = f"bucket-{len(self.buckets)}"
        requests.put(f"http://{HOST}:{self.port}/{name}", timeout=10).raise_for_status()
        self.buckets.append(name)
        return name

    def address(self, bucket: str, folder: str = "runs") -> str:
        """Of a storage, by way of the wire."""
        return f"s3://{bucket}/{folder}?region=us-east-1&scheme=http&endpoint_override={HOST}:{self.wire.port}"

    def files(self, bucket: str) -> Any:
        """A `pyarrow.fs` file system that looks at the server behind the wire's back."""
        import pyarrow.fs as pafs

        return pafs.SubTreeFileSystem(
            bucket, pafs.S3FileSystem(region="us-east-1", scheme="http", endpoint_override=f"{HOST}:{self.port}")
        )


@contextmanager
def s3_server(**environment: str) -> Iterator[S3]:
    """A server for as long as it is needed; `environment` is added to its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)],
        env=os.environ | CREDENTIALS | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wire = Wire(port)
    try:
        _await(process, port)
        yield S3(process, port, wire)
    finally:
        wire.close()
        process.kill()
        process.wait()


def _await(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(requests.RequestException):
            requests.get(f"http://{HOST}:{port}/moto-api/", timeout=5)
            return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the S3 server didn't come up; is moto[s3] installed?")
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
