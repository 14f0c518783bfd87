"""A web server of weights, which misbehaves as it is told."""

import base64
import contextlib
import hashlib
import http.server
import io
import threading
import time

import numpy as np


def npz(seed, size=50_000):
    """Return the bytes of a small ``.npz``."""
    file = io.BytesIO()
    np.savez(file, x=np.random.default_rng(seed).standard_normal(size, np.float32))
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``, {path: bytes}, with what Google's servers and the hub send beside them.

    Each request takes the next of ``plan``: an HTTP status, or one of the words in
    :meth:`Handler.do_GET`; without one it is served well. ``requests`` are those of GET, as
    (path, headers).
    """

    daemon_threads = True

    def __init__(self, files, plan=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.requests = dict(files), list(plan), []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        """Ignore a client that leaves."""

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def serving(files, plan=()):
    server = Server(files, plan)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer("")

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        self._answer(self.server.plan.pop(0) if self.server.plan else "")

    def _answer(self, how):
        body = self.server.files.get(self.path)
        if body is None or isinstance(how, int):
            self._refuse(how or 404)
            return
        if how == "page":
            body = b"<html>Please log in"
        md5 = hashlib.md5(b"other" if how == "lie" else body)
        etag = f'"{md5.hexdigest()}"'
        asked = self.headers["Range"] if how not in ("ignore range", "bare", "endless") else None
        if self.headers["If-Range"] != etag and how != "ignore if-range":
            asked = None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(body):
            self._refuse(416)
            return
        self.send_response(206 if asked else 200)
        if asked:
            shown = start + 1 if how == "other piece" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}")
        if how != "endless":
            self.send_header("Content-Length", str(len(body) - start))
        if how not in ("bare", "bare close", "endless"):
            self.send_header("ETag", etag)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(md5.digest()).decode()}")
        self.end_headers()
        if self.command == "HEAD":
            return
        half = start + (len(body) - start) // 2
        self.wfile.write(body[start:half])
        self.wfile.flush()
        if how == "slow":
            time.sleep(0.3)
        if how == "stall":
            self.server.over.wait(10)
        if how == "vanish":
            self.server.socket.close()
        if how not in ("close", "bare close", "stall", "vanish"):
            self.wfile.write(body[half:])

    def _refuse(self, status):
        owner = self.path.split("/resolve/")[0]
        known = any(path.startswith(f"{owner}/") for path in self.server.files)
        self.send_response(status)
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
