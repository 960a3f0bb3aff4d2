"""A real S3 server on loopback, behind a proxy that fails a share of the requests as stores do on a bad day."""

import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

KINDS = ("slow down", "throttled", "dropped", "cut off")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FlakyS3:
    """The server, the proxy, and how bad the day is; `share` and `kinds` may be changed at any time."""

    def __init__(self, target: tuple[str, int], *, share: float = 0.0, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> None:
        """Listen on a free port.

        Args:
            target: host and port of the server behind.
            share: of requests that fail.
            kinds: how: 503 SlowDown, 429, closed without an answer, closed in the middle of the body.
            seed: of the dice.
        """
        self.target, self.share, self.kinds = target, share, kinds
        self.requests: Counter[str] = Counter()
        """By method."""
        self.faults: Counter[str] = Counter()
        """By kind."""
        self._dice, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"flaky": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which every client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "do-not-show-me",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def fate(self, method: str) -> str | None:
        """Count a request and return how it fails; None if it does not."""
        with self._lock:
            self.requests[method] += 1
            if self._dice.random() >= self.share:
                return None
            kind = self._dice.choice(self.kinds)
            self.faults[kind] += 1
            return kind

    def make_bucket(self, name: str) -> str:
        """Make a bucket, past the proxy, and return its URL."""
        link = HTTPConnection(*self.target)
        link.request(
            "PUT", f"/{name}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=loopback/20260101/us-east-1/s3/aws4_request"}
        )
        assert link.getresponse().status == 200
        link.close()
        return f"s3://{name}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    flaky: FlakyS3

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _forward(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.flaky.fate(self.command)
        if fate == "dropped":
            self.close_connection = True
            return
        if fate in ("slow down", "throttled"):
            self._answer(503 if fate == "slow down" else 429, {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
            return
        link = HTTPConnection(*self.flaky.target, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        link.request(self.command, self.path, content or None, headers)
        answer = link.getresponse()
        body = answer.read()
        # Of an answer to HEAD the length is that of the file, and there is no body.
        length = int(answer.headers.get("Content-Length", len(body)))
        link.close()
        kept = {n: v for n, v in answer.headers.items() if n.lower() not in ("connection", "content-length", "transfer-encoding")}
        if fate == "cut off":
            self.close_connection = True
            body = body[: len(body) // 2]
        self._answer(answer.status, kept, body, length)

    def _answer(self, status: int, headers: Mapping[str, Any], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 (names of the standard library)


@contextmanager
def flaky_s3(*, share: float = 0.0, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> Iterator[FlakyS3]:
    """Run a server and its proxy in threads of this process; clients in other processes reach them too."""
    # s3fs keeps its clients, with the endpoint that they were made with.
    S3FileSystem.clear_instance_cache()
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        flaky = FlakyS3((host, port), share=share, kinds=kinds, seed=seed)
        try:
            yield flaky
        finally:
            flaky.close()
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()
