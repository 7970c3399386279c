"""Serve this folder on this computer: python3 serve.py [PORT].

The two headers isolate the page, so that WebAssembly may use all cores. Every server that publishes the page should
send them, and `text/javascript` for .mjs and `application/wasm` for .wasm.
"""

import functools
import http.server
import sys
from pathlib import Path

TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm"}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with the headers that isolate the page."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | TYPES

    def end_headers(self) -> None:
        """Add the headers."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


def server(port: int = 8000) -> http.server.ThreadingHTTPServer:
    """Return a server of this folder that listens on this computer only."""
    handler = functools.partial(Handler, directory=str(Path(__file__).parent))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    chosen = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    try:
        listening = server(chosen)
    except OSError as error:
        sys.exit(f"error: cannot listen on port {chosen} ({error.strerror}); choose another: python3 serve.py PORT")
    print(f"http://localhost:{chosen}/")
    listening.serve_forever()
