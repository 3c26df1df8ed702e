"""A plain static HTTP server, as fast as this machine makes one, and a plain client: a yardstick.

`python -m tools.bench_fetch_http FOLDER` prints its port and serves whole files and byte ranges with
sendfile, a thread for each connection. The client reads ranges of files over several connections, each into
one buffer.
"""

from __future__ import annotations

import http.client
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue

READ_BYTES = 1024 * 1024
RANGE_BYTES = 32 * 1024 * 1024
TIMEOUT_S = 60.0
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class _Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        """One file of the folder, or a range of it."""
        path = self.folder / Path(self.path).name
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if not path.is_file():
            self.send_error(404)
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.flush()
            while first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def download(port: int, files: dict[str, int], connections: int, folder: Path | None) -> None:
    """Read files of these sizes over so many connections; into `folder`, synced, or nowhere."""
    work: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
    for name, size in files.items():
        for start in range(0, size, RANGE_BYTES):
            work.put((name, start, min(size, start + RANGE_BYTES)))
    opened = {
        name: os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) if folder else -1 for name in files
    }
    failures: list[BaseException] = []

    def read() -> None:
        try:
            _read_ranges(port, work, opened)
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(connections)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fd in opened.values():
            if fd >= 0:
                os.fsync(fd)
    finally:
        for fd in opened.values():
            if fd >= 0:
                os.close(fd)
    if failures:
        raise failures[0]


def _read_ranges(port: int, work: SimpleQueue[tuple[str, int, int]], opened: dict[str, int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    buffer = memoryview(bytearray(READ_BYTES))
    try:
        while True:
            try:
                name, start, end = work.get_nowait()
            except Empty:
                return
            connection.request("GET", f"/{name}", headers={"Range": f"bytes={start}-{end - 1}"})
            response = connection.getresponse()
            while start < end:
                count = response.readinto(buffer)
                if not count:
                    raise OSError(f"{name} ended {end - start} bytes early")
                if opened[name] >= 0:
                    os.pwrite(opened[name], buffer[:count], start)
                start += count
            response.read()
    finally:
        connection.close()


def main() -> None:
    """Serves until it is killed."""
    _Files.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
