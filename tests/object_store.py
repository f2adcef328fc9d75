"""Google Cloud Storage on this machine: `object_store()` runs an emulator and points clients to it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

BUCKET = "bucket"
SECONDS = 60


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """The environment in which gs://bucket is a store that is empty and only in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, __file__, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        address = f"http://127.0.0.1:{port}"
        yield {
            "STORAGE_EMULATOR_HOST": address,  # for gcsfs
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # for TensorStore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, "the emulator ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no emulator after {SECONDS} s")


def serve(port: int) -> None:
    """Runs the emulator; it says of what it serves which generation it is, as TensorStore wants."""
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *arguments, **named):
        plain(request, response, storage, *arguments, **named)
        if response.status < 400:
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]

    objects.download = download  # before the server lists its handlers
    from gcp_storage_emulator.server import create_server

    create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    serve(int(sys.argv[1]))
