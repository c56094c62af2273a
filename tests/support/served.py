"""Server processes on loopback, for the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

STARTING = 300.0
"""Seconds until a server must answer; 8 on an idle machine."""


class ServerProcess:
    """A server command, ``{port}`` replaced by a free port; it may be killed and started again."""

    def __init__(self, command: Sequence[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [part.format(port=self.port) for part in command]
        self.url = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.url}/v1"
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + STARTING
        while True:
            try:
                self.get("/health")
                return
            except OSError:
                assert self._process.poll() is None, f"{self._command} ended with {self._process.returncode}"
                assert time.monotonic() < deadline, f"{self._command} does not answer"
                time.sleep(0.1)

    def wait(self) -> int:
        return self._process.wait(timeout=30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


def lora_server(model: Path) -> ServerProcess:
    """The tests' own server, with vLLM's API."""
    return ServerProcess([sys.executable, str(ROOT / "tests" / "support" / "lora_server.py"), str(model), "{port}"])


def transformers_serve(model: Path) -> ServerProcess:
    """transformers' server."""
    program = str(Path(sys.executable).with_name("transformers"))
    return ServerProcess([program, "serve", str(model), "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"])
