"""A Hugging Face hub on this machine, for one model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(repo_id: str, folder: Path, cache: Path) -> Iterator[list[str]]:
    """Serve a folder as a model of the hub; yields the paths of the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            resolved = f"/{repo_id}/resolve/{COMMIT}/"
            if path.startswith(resolved):
                name = path.removeprefix(resolved)
                content = (folder / name).read_bytes()
                if body:
                    fetched.append(name)
            elif path.startswith(f"/api/models/{repo_id}/tree/"):
                names = [str(file.relative_to(folder)) for file in files]
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in zip(names, files, strict=True)
                ]
                content = json.dumps(entries).encode()
            else:
                content = json.dumps({"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:40]}"')
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "ENDPOINT", address)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            yield fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
