"""A small HTTP server on this machine, for audio that a CSV names by its address."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# Tests that open sockets to this machine are marked so.
needs_server = pytest.mark.allow_hosts(["127.0.0.1"])


class FileServer:
    """Serve files by path, keep the paths that were asked for, and never answer `/slow`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.ends = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path == "/slow":
                    outer.ends.wait()
                body = outer.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *words) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    def close(self) -> None:
        """Stop serving."""
        self.ends.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
