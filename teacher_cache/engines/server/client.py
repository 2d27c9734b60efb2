"""JSON over HTTP with retries: a request is sent again until it is answered, and answered once."""

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from teacher_cache.engines import EngineError
from teacher_cache.engines.server.settings import KEY_VARIABLE, server_address

logger = logging.getLogger(__name__)

_ANSWER_S = 3600.0  # a long trace on a busy server
_GIVE_UP_S = 600.0  # a server is restarted in that time
_LONGEST_PAUSE_S = 30.0
_TOO_BUSY = {408, 409, 425, 429}  # and all from 500 on but 501: worth another try
_SERVER_ERROR, _NOT_IMPLEMENTED = 500, 501
_NO_ENTRY = {401, 403}
_MESSAGE_CHARACTERS = 300


class RefusedError(EngineError):
    """The server will never answer this: the status and what it said."""

    def __init__(self, where: str, status: int, said: str) -> None:
        """Make the error of one answer."""
        if status in _NO_ENTRY:
            said = f"{said} (the key is read from {KEY_VARIABLE}, which is "
            said += "set)" if os.environ.get(KEY_VARIABLE, "").strip() else "not set)"
        super().__init__(f"{where}: the server answered {status}: {said}")
        self.status, self.said = status, said


class Client:
    """One server; a connection for each thread."""

    def __init__(self, url: str, *, give_up_s: float = _GIVE_UP_S) -> None:
        """Take the address; nothing is sent yet.

        Raises:
            EngineError: If it is no address, or the key cannot be sent.
        """
        try:
            parts = server_address(url)
        except ValueError as error:
            raise EngineError(str(error)) from error
        self.url = url
        self._parts = parts
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []  # of all threads
        self._closing = threading.Event()
        self._give_up_s = give_up_s
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and (key.isprintable() or not key)):
            raise EngineError(f"{KEY_VARIABLE}: expected printable ASCII characters alone")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path; raises as `post`."""
        return self._answer("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object and return the answer.

        Raises:
            RefusedError: If the server refuses it.
            EngineError: If it does not answer for `give_up_s` seconds, or not with an object.
        """
        return self._answer("POST", path, json.dumps(body).encode())

    def close(self) -> None:
        """Give up every request, and close the connections."""
        self._closing.set()
        for connection in self._connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # it may be closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
            connection.close()

    def _answer(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        where, pause_s = f"{self.url}: {path}", 0.5
        end_s = time.monotonic() + self._give_up_s
        while True:
            try:
                status, content = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                trouble = str(error) or type(error).__name__
            else:
                if status < http.HTTPStatus.MULTIPLE_CHOICES:
                    return _object(where, content)
                said = _said(content)
                is_final = status < _SERVER_ERROR or status == _NOT_IMPLEMENTED
                if is_final and status not in _TOO_BUSY:
                    raise RefusedError(where, status, said)
                trouble = f"{status}: {said}"
            if time.monotonic() + pause_s > end_s or self._closing.wait(pause_s):
                raise EngineError(
                    f"{where}: no answer ({trouble}), tried for {self._give_up_s:g} s. Finished "
                    "traces are kept: run the same command again once the server is there"
                )
            logger.info("%s: %s; trying again", where, trouble)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """One try; the connection is kept for the thread's next."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = (
                http.client.HTTPSConnection
                if self._parts.scheme == "https"
                else http.client.HTTPConnection
            )
            connection = kind(str(self._parts.hostname), self._parts.port, timeout=_ANSWER_S)
            self._local.connection = connection
            self._connections.append(connection)
        try:
            connection.request(method, f"{self._prefix}{path}", body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except BaseException:
            connection.close()  # it opens again at the next try
            raise


def check_server(url: str) -> None:
    """Ask a server once what it serves: an address that is wrong is wrong at once.

    Raises:
        EngineError: If it is no address, or nothing answers there.
    """
    with contextlib.closing(Client(url, give_up_s=0)) as client:
        client.get("/v1/models")


def _object(where: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise EngineError(f"{where}: the answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _said(content: bytes) -> str:
    """What an error's answer says, in one line."""
    text = content.decode(errors="replace")
    try:
        value = json.loads(text)
        error = value.get("error", value)
        text = str(error.get("message", error))
    except (ValueError, AttributeError):
        pass  # not JSON: the text itself says it
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]
