"""A stand-in for the Hugging Face Hub on loopback: reads of one dataset repository."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

REPOSITORY = "me/cache"
_COMMIT = "a" * 40
_API = f"/api/datasets/{REPOSITORY}"
_LFS = f"/datasets/{REPOSITORY}.git/info/lfs/objects/batch"


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves the files below `root`; `num_bytes` counts what was sent of them, by name."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), _Hub)
        self.root = Path(root)
        self.num_bytes = {}
        self.num_ranges = 0
        self.num_commits, self.fail_at_commit, self.sent = 0, None, []
        self.lfs_suffix, self.lfs = None, {}  # files sent as LFS objects; these, by sha256
        self.is_private = False
        self.num_failing = 0  # answers of 503 still to be given to reads of files

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the play."""


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def send(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status=200, **headers):
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def no_entry(self):
        self.send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    def entry(self, path):
        is_file = path.is_file()
        return {
            "type": "file" if is_file else "directory",
            "path": str(path.relative_to(self.server.root)),
            "size": path.stat().st_size if is_file else 0,
            "oid": git_sha1(path.read_bytes() if is_file else b""),
        } | (self.lfs_entry(path) if is_file and path.suffix == self.server.lfs_suffix else {})

    def lfs_entry(self, path):
        oid = hashlib.sha256(path.read_bytes()).hexdigest()
        lfs = {"oid": oid, "size": path.stat().st_size, "pointerSize": 130}
        return {"oid": git_sha1(oid.encode()), "lfs": lfs}  # the blob is a pointer's

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        answer = self.written(body)
        if answer is not None:
            return self.send_json(*answer)
        if not self.path.startswith(f"{_API}/paths-info/"):
            return self.no_entry()
        try:
            names = json.loads(body)["paths"]
        except ValueError:
            names = parse_qs(body).get("paths", [])
        names = [names] if isinstance(names, str) else names
        found = (self.server.root / name for name in names)
        return self.send_json([self.entry(path) for path in found if path.exists()])

    def written(self, body):
        """The answer to a request of an upload, whose files are few and stand in the commit."""
        server = self.server

        def is_lfs(name):
            return Path(name).suffix == server.lfs_suffix

        if self.path == _LFS:
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in server.lfs:
                    href = f"{server.url}/lfs/{each['oid']}"
                    each["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
            return {"transfer": "basic", "objects": objects}, 200
        if self.path.startswith("/lfs/"):  # the verification
            held = server.lfs.get(json.loads(body)["oid"])
            return {}, 200 if held is not None else 404
        if self.path == "/api/repos/create":
            server.root.mkdir()
            server.is_private = json.loads(body).get("private") or False
            return ({"url": f"{server.url}/datasets/{REPOSITORY}"},)
        if self.path == "/api/validate-yaml":
            return ({"warnings": [], "errors": []},)
        if self.path.startswith(f"{_API}/preupload/"):
            return (
                {
                    "files": [
                        {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                        for mode in ["lfs" if is_lfs(f["path"]) else "regular"]
                    ]
                },
            )
        if not self.path.startswith(f"{_API}/commit/"):
            return None
        if server.num_commits == server.fail_at_commit:
            server.fail_at_commit = None
            return {"error": "the Hub is tired"}, 400
        server.num_commits += 1
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] in ("file", "lfsFile"):
                value, is_plain = item["value"], item["key"] == "file"
                path = server.root / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                held = base64.b64decode(value["content"]) if is_plain else server.lfs[value["oid"]]
                path.write_bytes(held)
                server.sent.append(value["path"])
        url = f"{server.url}/datasets/{REPOSITORY}/commit/{_COMMIT}"
        return ({"commitOid": _COMMIT, "commitUrl": url, "hookOutput": ""},)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != oid:
            return self.send_json({"error": "another object"}, 400)
        self.server.lfs[oid] = content
        return self.send_json({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        tree = re.match(rf"{_API}/tree/[^/]+/?(.*)$", path)
        if tree:
            folder = self.server.root / tree[1]
            if not folder.is_dir():
                return self.no_entry()
            is_deep = "recursive=true" in self.path.lower()
            found = folder.rglob("*") if is_deep else folder.iterdir()
            return self.send_json([self.entry(each) for each in sorted(found)])
        if path.startswith(_API) and self.server.root.exists():
            facts = {"id": REPOSITORY, "sha": _COMMIT, "private": self.server.is_private}
            return self.send_json(facts | {"tags": []})
        file = re.match(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.+)$", path)
        if file and (self.server.root / file[1]).is_file():
            return self.send_file(file[1])
        if path.startswith("/api/datasets/"):
            return self.send_json({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        return self.no_entry()

    def send_file(self, name):
        server = self.server
        if server.num_failing:
            server.num_failing -= 1
            return self.send_json({"error": "busy"}, 503)
        content, status, headers = (server.root / name).read_bytes(), 200, {}
        size = len(content)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            content, status = content[first : last + 1], 206
            server.num_ranges += 1
        if self.command == "GET":
            server.num_bytes[name] = server.num_bytes.get(name, 0) + len(content)
        return self.send(
            content, status, ETag=f'"{size}"', X_Repo_Commit=_COMMIT, Accept_Ranges="bytes",
            **headers,
        )  # fmt: skip


@contextmanager
def hub_server(root):
    """A running server; its address is `url`."""
    server = HubServer(root)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
