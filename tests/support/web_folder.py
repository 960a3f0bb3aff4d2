"""A real HTTP server on loopback that serves a folder, with ranges and entity tags, and can be told to cut answers off."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class WebFolder(ThreadingHTTPServer):
    """Serves `root`; `cut_at` bytes into the next answer with a body it drops the connection, once."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cut_at: int | None = None
        self.asked: list[tuple[str, str]] = []
        """Path and range of every GET."""
        self.logins: list[str] = []
        """What those with a login said of it."""
        self.gone: set[str] = set()
        """Paths of files that it lists and does not have."""
        self.moved: dict[str, str] = {}
        """Where files have gone to, by path."""
        self.fixed: dict[str, bytes] = {}
        """Answers that are no files, by path."""
        self.headers: dict[str, str] = {}
        """Added to every answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: WebFolder

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        if "Authorization" in self.headers:
            self.server.logins.append(self.headers["Authorization"])
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        if path in self.server.fixed:
            self._send(200, self.server.fixed[path], {"Content-Type": "application/json"}, body=body)
            return
        if path in self.server.moved:
            self._send(302, b"", {"Location": self.server.moved[path]}, body=body)
            return
        file = self.server.root / path.lstrip("/")
        if file.is_dir():
            names = [f"{one.name}/" if one.is_dir() else one.name for one in sorted(file.iterdir())]
            content = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
            self._send(200, content, {"Content-Type": "text/html"}, body=body)
            return
        if not file.is_file() or path in self.server.gone:
            self._send(404, b"", {}, body=body)
            return
        content = file.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in self.headers else 0
        if self.headers.get("If-Range", tag) != tag or start == 0:
            self._send(200, content, {"ETag": tag}, body=body)
        elif start >= len(content):
            self._send(416, b"", {}, body=body)
        else:
            self._send(206, content[start:], {"ETag": tag}, body=body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, **self.server.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        cut, self.server.cut_at = self.server.cut_at, None
        self.wfile.write(content[:cut])
        self.close_connection = True


@contextmanager
def web_folder(root: Path) -> Iterator[WebFolder]:
    """Serve a folder while the block runs."""
    with WebFolder(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
