"""The command `serve` in a process of its own, and what clients send it."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 120


class Served:
    """Run `serve` with some words, at a free port, until it is closed."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mdl_toolkit", "serve", *words, "--port", "0"],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said, self.url = "", ""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                break
        assert self.url, self.said
        # What it says later must not fill the pipe.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.said += line

    def close(self) -> int:
        """Stop it as Ctrl-C does, and return its exit status."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def ask(self, recording: Path | bytes, *prompts: str | None, **fields: Any) -> httpx.Response:
        """Send a chat about a recording."""
        return self.client.post("/v1/chat/completions", json=chat(recording, *prompts, **fields))


def chat(
    recording: Path | bytes, prompt: str | None = None, system: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Return a chat about a recording."""
    content = recording if isinstance(recording, bytes) else recording.read_bytes()
    audio = {"data": base64.b64encode(content).decode(), "format": "wav"}
    parts: list[dict[str, Any]] = [{"type": "input_audio", "input_audio": audio}]
    if prompt is not None:
        parts.append({"type": "text", "text": prompt})
    before = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*before, {"role": "user", "content": parts}], **fields}


def text_of(response: httpx.Response) -> str:
    """Return the answer in a response to a chat."""
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, whose last one says that it is complete."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
