"""A server on 127.0.0.1 that speaks as much of the Hugging Face hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1f" * 20


@dataclass
class Hub:
    """One repository and what happens to it.

    Attributes:
        kind: `datasets` or `models`.
        revisions: names that mean its one commit.
        token: if set, requests must bear it; others get what the hub says about a gated repository.
        break_after: paths whose next transfer breaks after so many bytes.
        refused: paths whose content is answered with 500 (parts of it are sent).
        held: paths whose content waits for an event.
        swapped: paths that are sent with other content than the tree says.
        transfers: (path, Range header or "", bytes sent) of each GET of a file.
    """

    repository: str
    files: dict[str, bytes]
    kind: str = "datasets"
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    break_after: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    held: dict[str, threading.Event] = field(default_factory=dict)
    swapped: dict[str, bytes] = field(default_factory=dict)
    transfers: list[tuple[str, str, int]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.url` while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api = f"/api/{hub.kind}/{hub.repository}"
            resolve = f"{'/datasets' * (hub.kind == 'datasets')}/{hub.repository}/resolve/{COMMIT}/"
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.refuse(401, "GatedRepo")
            elif path in [f"{api}/revision/{revision}" for revision in (*hub.revisions, COMMIT)]:
                siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                self.json({"id": hub.repository, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"{api}/revision/"):
                self.refuse(404, "RevisionNotFound")
            elif path == f"{api}/tree/{COMMIT}":
                self.json([_entry(name, data) for name, data in hub.files.items()])
            elif path.startswith("/api/") and not path.startswith(api):
                self.refuse(404, "RepoNotFound")
            elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
                self.file(path.removeprefix(resolve))
            else:
                self.refuse(404, "EntryNotFound")

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def file(self, name: str) -> None:
            data = hub.swapped.get(name, hub.files[name])
            given = self.headers.get("Range", "")
            is_part = given and not given.endswith("-")  # of a header; a transfer that goes on wants all the rest
            if self.command == "GET" and name in hub.refused and not is_part:
                return self.refuse(500, "")
            if self.command == "GET" and name in hub.held and not is_part:
                hub.held[name].wait(10)
            first, last = given.removeprefix("bytes=").split("-") if given else ("0", "")
            start, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            self.send_response(206 if given else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')
            self.send_header("Content-Length", str(end - start))
            if given:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            stop = end if is_part else hub.break_after.pop(name, end)
            hub.transfers.append((name, given, len(data[start:stop])))
            self.wfile.write(data[start:stop])
            if stop < end:
                self.wfile.flush()
                self.close_connection = True
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the tree lists it: big ones by sha256 (LFS), `.md` by git's hash."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if not name.endswith(".md"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
