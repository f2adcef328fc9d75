"""Object stores on this machine: `object_store(scheme)` runs an emulator and points clients to it."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"
SECONDS = 60


@contextlib.contextmanager
def object_store(scheme: str) -> Iterator[dict[str, str]]:
    """The environment in which gs://bucket, or s3://bucket, is a store that is empty and only in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, __file__, scheme, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/{BUCKET}" if scheme == "s3" else address, server)
        yield {
            "gs": {
                "STORAGE_EMULATOR_HOST": address,  # for gcsfs
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # for TensorStore
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
            "s3": {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "none",
                "AWS_SECRET_ACCESS_KEY": "none",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        }[scheme]
    finally:
        server.kill()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen) -> None:
    """Until it answers there; Amazon's makes its bucket when it runs already."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, "the emulator ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no emulator after {SECONDS} s")


def serve_gs(port: int) -> None:
    """Runs an emulator of Google's; it says of what it serves which generation it is, as TensorStore wants."""
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


def serve_s3(port: int) -> None:
    """Runs an emulator of Amazon's."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    named = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    boto3.client("s3", **named, **keys).create_bucket(Bucket=BUCKET)
    threading.Event().wait()


if __name__ == "__main__":
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    {"gs": serve_gs, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]))
