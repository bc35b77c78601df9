"""An object store in this process that speaks the part of Cloud Storage's JSON API that is used.

gcsfs finds it by STORAGE_EMULATOR_HOST, TensorStore by TENSORSTORE_GCS_HTTP_URL. Objects have
generations, and preconditions on them hold, as in the real store: TensorStore's databases and the
claim of a fresh folder rest on that.
"""

import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit


class Store:
    """The objects of one bucket, and what became of them.

    Attributes:
      objects: {name: (data, generation)}.
      writes: (name, data) of each object that was written, in that order.
      before: called with a name before an object is written.
      refused: methods that are answered with 403.
      denied: a part of names whose objects are answered with 403.
      down: whether everything is answered with 401, which nobody asks again.
    """

    def __init__(self, bucket: str = "bucket"):
        self.bucket = bucket
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.writes: list[tuple[str, bytes]] = []
        self.before: Callable[[str], None] = lambda name: None
        self.refused: tuple[str, ...] = ()
        self.denied = ""
        self.down = False
        self.url = ""
        self._lock, self._count = threading.RLock(), 0
        self._unfinished: dict[str, tuple[dict, bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process find it."""
        urls = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), self.url)
        # The kind of bucket is asked over another protocol.
        return urls | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def put(self, name: str, data: bytes, query: dict[str, str]) -> tuple[int, bytes]:
        self.before(name)
        with self._lock:
            if not self._holds(name, query):
                return 412, b"{}"
            self._count += 1
            self.objects[name] = data, self._count
            self.writes.append((name, data))
            return 200, self.about(name)

    def _holds(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.objects.get(name, (b"", 0))[1]

    def about(self, name: str) -> bytes:
        return json.dumps(self._about(name)).encode()

    def _about(self, name: str) -> dict[str, str]:
        data, generation = self.objects[name]
        own = {"kind": "storage#object", "name": name, "bucket": self.bucket}
        times = dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")
        return own | times | {"size": str(len(data)), "generation": str(generation)}

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) of one request."""
        path, query = urlsplit(target).path, dict(parse_qsl(urlsplit(target).query))
        if path.startswith("/batch/"):
            return self._batch(body)
        if self.down:
            return 401, b'{"error": {"message": "who are you?", "code": 401}}', {}
        if method in self.refused:
            return 403, b'{"error": {"message": "you may not", "code": 403}}', {}
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if not found or found[2] != self.bucket:
            return 404, b'{"error": {"message": "no such bucket", "code": 404}}', {}
        if found[1] == "/upload":
            return self._upload(method, query, headers, body)
        if "/o" not in path[path.index("/b/") :]:
            return 200, json.dumps({"name": self.bucket, "kind": "storage#bucket"}).encode(), {}
        if not found[3]:
            return 200, json.dumps(self._list(query)).encode(), {}
        with self._lock:
            return self._object(method, found[3], query, headers, found[1] == "/download")

    def _object(
        self, method: str, name: str, query: dict, headers: dict, download: bool
    ) -> tuple[int, bytes, dict[str, str]]:
        parts = re.fullmatch(r"([^/]+)(?:/(moveTo|rewriteTo)/(?:b/[^/]+/)?o/(.+))?", name)
        name, way, goal = unquote(parts[1]), parts[2], parts[3]
        if self.denied and self.denied in name:
            return 403, b'{"error": {"message": "not this one", "code": 403}}', {}
        if name not in self.objects:
            return 404, b'{"error": {"message": "No such object", "code": 404}}', {}
        data, generation = self.objects[name]
        if way:
            status, about = self.put(unquote(goal), data, {})
            if way == "moveTo":
                del self.objects[name]
                return status, about, {}
            done = {"done": True, "resource": json.loads(about), "objectSize": str(len(data))}
            return status, json.dumps(done | {"totalBytesRewritten": str(len(data))}).encode(), {}
        if not self._holds(name, query):
            return 412, b"{}", {}
        if method == "DELETE":
            del self.objects[name]
            return 204, b"", {}
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        if not download and query.get("alt") != "media":
            return 200, self.about(name), {}
        told = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
        if not asked:
            return 200, data, told
        first = int(asked[1]) if asked[1] else len(data) - int(asked[2])
        end = min(int(asked[2]) + 1, len(data)) if asked[1] and asked[2] else len(data)
        if first >= len(data):
            return 416, b"", told
        told["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        return 206, data[first:end], told

    def _list(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self._lock:
            for name in sorted(self.objects):
                inside = query.get("startOffset", "") <= name
                inside &= "endOffset" not in query or name < query["endOffset"]
                if not inside or not name.startswith(prefix):
                    continue
                below = name[len(prefix) :]
                if delimiter and delimiter in below:
                    prefixes.add(prefix + below[: below.index(delimiter) + 1])
                else:
                    items.append(self._about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _upload(
        self, method: str, query: dict, headers: dict, body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if "POST" in self.refused:
            return 403, b'{"error": {"message": "you may not", "code": 403}}', {}
        if "upload_id" in query:
            first, before = self._unfinished[query["upload_id"]]
            data = before + body
            total = headers.get("Content-Range", "/*").rpartition("/")[2]
            if total == "*" or len(data) < int(total):
                self._unfinished[query["upload_id"]] = first, data
                return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"}
            return *self.put(first["name"], data, first), {}
        if query["uploadType"] == "resumable":
            key = str(len(self._unfinished))
            self._unfinished[key] = {"name": json.loads(body)["name"]} | query, b""
            place = f"{self.url}/upload/storage/v1/b/{self.bucket}/o?upload_id={key}"
            return 200, b"{}", {"Location": place}
        if query["uploadType"] == "multipart":
            mark = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
            _, about, data, _ = body.split(b"--" + mark)
            parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, data)]
            return *self.put(json.loads(parts[0])["name"], parts[1][:-1], query), {}
        return *self.put(query["name"], body, query), {}

    def _batch(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = re.findall(r"^DELETE (\S+) HTTP", body.decode(), re.MULTILINE)
        parts = []
        for target in asked:
            status, answer, _ = self.answer("DELETE", target, {}, b"")
            parts.append(f"--of\r\n\r\nHTTP/1.1 {status} OK\r\n\r\n{answer.decode()}\r\n")
        return 200, ("".join(parts) + "--of--").encode(), {"Content-Type": "multipart; boundary=of"}


@contextmanager
def serving(store: Store):
    """The store, at an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: the system holds a second one back

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer, headers = store.answer(
                self.command, self.path, {k.title(): v for k, v in self.headers.items()}, body
            )
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            with suppress(OSError):  # of two questions at once only one answer may be awaited
                self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

        def handle(self):
            with suppress(OSError):
                super().handle()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serving(Store()) as served:
        print(served.url, flush=True)
        threading.Event().wait()
