"""The hub's HTTP interface on this machine's loopback: what uploading and downloading a model needs of it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

OWNER, COMMIT = "owner", "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A context in which a hub runs at `url`; `files` is `{repository: {path: bytes}}`.

    Args:
        token: the only one that may write.
    """

    def __init__(self, token="hf_right"):
        self.token, self.files, self.large, self.requests = token, {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def post(self, path, body):
        """Answer a POST with something that becomes JSON."""
        if path == "/api/repos/create":
            repository = f"{OWNER}/{json.loads(body)['name']}"
            self.files.setdefault(repository, {})
            return {"url": f"{self.url}/{repository}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.url}/large/{item['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        assert path.endswith("/commit/main"), path
        repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repository][value["path"]] = self.large[value["oid"]]
        return {"success": True, "commitUrl": f"{self.url}/{repository}/commit/1", "commitOid": COMMIT}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def body(self):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def reply(self, status, content=b"", **headers):
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def reply_json(self, value):
                self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

            def do_POST(self):
                body, path = self.body(), self.path.split("?")[0]
                hub.requests.append((self.command, path))
                if path.endswith("/paths-info/main"):  # a question that anybody may ask
                    found = hub.files["/".join(path.split("/")[3:5])]
                    names = [name for name in parse_qs(body.decode())["paths"] if name in found]
                    return self.reply_json(
                        [{"type": "file", "path": n, "size": len(found[n]), "oid": "0"} for n in names]
                    )
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.reply(401, b'{"error": "Invalid credentials"}')
                self.reply_json(hub.post(path, body))

            def do_PUT(self):
                body, oid = self.body(), self.path.rsplit("/", 1)[1]
                assert hashlib.sha256(body).hexdigest() == oid
                hub.large[oid] = body
                self.reply(200)

            def do_GET(self):
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path))
                if path.startswith(("/api/models/", "/api/datasets/")):
                    repository = "/".join(path.split("/")[3:5])
                    if repository not in hub.files:
                        return self.reply(404, b'{"error": "not found"}', X_Error_Code="RepoNotFound")
                    if "/tree/" in path:
                        files = hub.files[repository].items()
                        return self.reply_json(
                            [{"type": "file", "path": name, "size": len(c), "oid": "0"} for name, c in files]
                        )
                    siblings = [{"rfilename": name} for name in hub.files[repository]]
                    return self.reply_json({"id": repository, "sha": COMMIT, "siblings": siblings})
                if path == "/parquet":  # of the service that converts datasets
                    return self.reply(404)
                owner, name, resolve, revision, file = path.removeprefix("/datasets")[1:].split("/", 4)
                content = hub.files[f"{owner}/{name}"][file]
                etag = hashlib.sha256(content).hexdigest()
                self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

        return Handler
