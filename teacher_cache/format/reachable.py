"""A quick check, once per process, that the server of a remote cache answers.

Arrow's clients retry for minutes: right for an outage, wrong for a misspelt address.
"""

import functools
import os
import socket
from urllib.parse import parse_qs, urlsplit

from teacher_cache.format.errors import CacheError

_ANSWER_S = 5.0


def check_reachable(uri: str, where: str) -> None:
    """Check once per process whether the server of a URI accepts connections.

    Args:
        uri: URI of a cache.
        where: The URI as shown in messages.

    Raises:
        CacheError: If the server does not answer.
    """
    server = _server_of(uri)
    if server is not None:
        reason = _why_not(*server)
        if reason is not None:
            raise CacheError(
                f"{where}: nobody answers at {server[0]}:{server[1]} ({reason}); check the "
                "address and the network"
            )


def _server_of(uri: str) -> tuple[str, int] | None:
    """Host and port; None if they are unknown or behind a proxy."""
    parts = urlsplit(uri)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "http_proxy")):
        return None
    if parts.scheme == "hdfs":
        return (parts.hostname, parts.port or 8020) if parts.hostname else None
    if parts.scheme == "hf":
        hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        port = hub.port or (80 if hub.scheme == "http" else 443)
        return (hub.hostname, port) if hub.hostname else None
    if parts.scheme not in ("s3", "gs", "gcs"):
        return None
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    default = "storage.googleapis.com"
    if parts.scheme == "s3":
        region = options.get("region") or os.environ.get("AWS_REGION") or "us-east-1"
        default = f"s3.{region}.amazonaws.com"
    named = options.get("endpoint_override") or _endpoint_from_environment(parts.scheme) or default
    scheme, separator, rest = named.rpartition("://")
    server = urlsplit(f"//{rest}")
    is_plain = (scheme if separator else options.get("scheme")) == "http"
    return (server.hostname, server.port or (80 if is_plain else 443)) if server.hostname else None


def _endpoint_from_environment(scheme: str) -> str | None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if scheme != "s3":
        names = ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


@functools.cache
def _why_not(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), _ANSWER_S).close()
    except OSError as error:
        return str(error)
    return None
