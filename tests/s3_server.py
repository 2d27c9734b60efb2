"""An S3-speaking server on loopback, and a proxy before it that fails some requests."""

import http.client
import random
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.fs as pafs

BUCKET = "bucket"
SECRET = "verysecret"
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
_LATE_S = 0.3
_OF_ONE_HOP = ("content-length", "transfer-encoding", "connection", "expect")


class FlakyProxy(ThreadingHTTPServer):
    """Forwards requests, and fails or delays a share of them.

    Attributes:
        fault_share: Share of requests that go wrong in one of the ways of `num_faults`.
        num_faults: Requests that went wrong: answered 500 or 503, closed or reset without an
            answer, answered in part, answered late.
        old_lists: Answers to listings by their paths, repeated from now on; None to pass them on.
    """

    daemon_threads = True

    def __init__(self, backend):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.backend = backend
        self.fault_share = 0.0
        self.num_requests = 0
        self.num_faults = {"error": 0, "dropped": 0, "reset": 0, "cut": 0, "late": 0}
        self.old_lists = None
        self.rng = random.Random(0)

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the play."""


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        server = self.server
        server.num_requests += 1
        body = self.body()
        fault = None
        if server.rng.random() < server.fault_share:
            fault = server.rng.choice(list(server.num_faults))
            server.num_faults[fault] += 1
        if fault == "error":
            self.answer(server.rng.choice([500, 503]), [], _SLOW_DOWN)
        elif fault in ("dropped", "reset"):
            linger = struct.pack("ii", fault == "reset", 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif server.old_lists is not None and self.path in server.old_lists:
            self.answer(*server.old_lists[self.path])
        else:
            if fault == "late":
                time.sleep(_LATE_S)
            connection = http.client.HTTPConnection(*server.backend)
            kept = {n: v for n, v in self.headers.items() if n.lower() not in _OF_ONE_HOP}
            connection.request(self.command, self.path, body, kept)
            found = connection.getresponse()
            content = found.read()
            answer = (found.status, found.getheaders(), content)
            if server.old_lists is not None and self.command == "GET" and "list-type=" in self.path:
                server.old_lists[self.path] = answer
            self.answer(*answer, cut=fault == "cut")
            connection.close()

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status, headers, content, cut=False):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _OF_ONE_HOP:
                self.send_header(name, value)
        length = len(content)
        if self.command == "HEAD":
            length = next((v for n, v in headers if n.lower() == "content-length"), 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, *arguments):
        pass


@contextmanager
def s3_server():
    """(proxy, URI of a folder name) of a new and empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FlakyProxy(server.get_host_and_port())
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    options = f"endpoint_override=127.0.0.1:{proxy.server_port}&scheme=http&region=us-east-1"

    def uri(name):
        return f"s3://me:{SECRET}@{BUCKET}/{name}?{options}"

    filesystem, _ = pafs.FileSystem.from_uri(f"{uri('x')}&allow_bucket_creation=true")
    filesystem.create_dir(BUCKET)
    try:
        yield proxy, uri
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        server.stop()
