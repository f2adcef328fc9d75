"""How the processes of a run find each other, as they are told or as a cluster tells them; what they do."""

import socket
import time
from pathlib import Path

import forked
import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICK, command_environment, python_process
from models import make_run, small_config

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import initialize_processes
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


@pytest.mark.parametrize(
    "coordinator, processes, number, words",
    [
        ("127.0.0.1:9999", "two", "0", "PREFIXMEM_PROCESSES=two: expected a whole number, 1 or more"),
        ("127.0.0.1:9999", "0", "0", "PREFIXMEM_PROCESSES=0: expected a whole number, 1 or more"),
        ("127.0.0.1:9999", "2", "7", "PREFIXMEM_PROCESS_ID=7: expected a whole number, 0 to 1"),
        ("127.0.0.1:9999", "2", "-1", "PREFIXMEM_PROCESS_ID=-1: expected a whole number, 0 to 1"),
        ("127.0.0.1:9999", "2", "²", "PREFIXMEM_PROCESS_ID=²: expected a whole number, 0 to 1"),
        ("127.0.0.1:9999", "2", "", "PREFIXMEM_PROCESS_ID is not set; set all of PREFIXMEM_COORDINATOR"),
        ("127.0.0.1", "2", "0", "PREFIXMEM_COORDINATOR=127.0.0.1: expected HOST:PORT"),
        (":9999", "2", "0", "PREFIXMEM_COORDINATOR=:9999: expected HOST:PORT"),
        ("host:99999", "2", "0", "PREFIXMEM_COORDINATOR=host:99999: expected HOST:PORT"),
    ],
)  # fmt: skip
def test_a_wrong_description_of_the_processes_is_refused(
    monkeypatch, coordinator, processes, number, words
):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("joined"))
    for name, value in (
        ("COORDINATOR", coordinator),
        ("PROCESSES", processes),
        ("PROCESS_ID", number),
    ):
        monkeypatch.setenv(f"PREFIXMEM_{name}", value)
    with pytest.raises(UserError) as error:
        initialize_processes()
    assert words in str(error.value) and "\n" not in str(error.value)


def in_processes(count: int, folder: Path, *arguments: object) -> list[str]:
    """What each of so many processes of one command says; they have two devices, together."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    started = []
    for number in range(count):
        devices = f"--xla_force_host_platform_device_count={2 // count} {QUICK}"
        environment = command_environment() | {
            "XLA_FLAGS": devices,
            "PREFIXMEM_COORDINATOR": f"127.0.0.1:{port}",
            "PREFIXMEM_PROCESSES": str(count),
            "PREFIXMEM_PROCESS_ID": str(number),
        }
        out, err = (folder / f"{name}-{number}" for name in ("out", "err"))
        arguments = [*map(str, arguments)]
        process = forked.start(forked.command, [*arguments, "--distributed"], environment, out, err)
        started.append((process, out, err))
    for process, _, err in started:
        process.join(100)
        assert process.exitcode == 0, err.read_text()
    return [out.read_text() for _, out, _ in started]


def test_two_processes_export_and_recommend_what_one_does(tmp_path):
    sid_encoder = PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=40, d_mem=8)
    run = make_run(
        tmp_path / "run", small_config(DecoderConfig(layers=1), 0, sid_encoder=sid_encoder)
    )
    items, users = len(run.catalog()), 41
    histories = [[(7 * user + at) % items for at in range(1 + user % 4)] for user in range(users)]
    table = pa.table({"user_id": range(users), "item_ids": histories})
    pq.write_table(table, tmp_path / "users.parquet")
    written = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        said = in_processes(count, out, "export", run.path, "--out", out / "export")
        assert [f"exported {run.path}: {out}/export\n" in one for one in said] == [
            number == 0 for number in range(count)
        ]
        in_processes(
            count, out, "recommend", run.path, "--histories", tmp_path / "users.parquet",
            "--out", out / "best.parquet", "--top", 5,
        )  # fmt: skip
        files = [*(out / "export").iterdir(), out / "best.parquet"]
        written[count] = {path.name: path.read_bytes() for path in files}
    assert written[1] == written[2] and "model.safetensors" in written[1]
    assert pq.read_table(out / "best.parquet")["user_id"].to_pylist() == list(range(users))


JOIN = """
import sys
from prefixmem_jax import cli
from prefixmem_jax.parallel import mesh
mesh.SECONDS_TO_JOIN = 2
sys.exit(cli.main(["evaluate", "RUN", "--distributed"]))
"""


@pytest.mark.parametrize(
    "number, words",
    [
        ("0", "process 1 of 2 did not come within 2 s (they count from 0)"),
        ("1", "the first process did not answer at 127.0.0.1:"),
    ],
)
def test_a_process_that_nobody_joins_ends_in_time_and_says_who_is_missing(number, words, free_port):
    started = time.monotonic()
    process = python_process(
        JOIN,
        PREFIXMEM_COORDINATOR=f"127.0.0.1:{free_port}",
        PREFIXMEM_PROCESSES="2",
        PREFIXMEM_PROCESS_ID=number,
    )
    output, errors = process.communicate(timeout=100)
    assert (output, process.returncode) == ("", 2) and time.monotonic() - started < 60
    assert errors.count("\n") == 1, errors
    assert errors.startswith(f"prefixmem: --distributed: {words}")


STAYS = """
import sys
from prefixmem_jax.parallel.mesh import all_devices, initialize_processes
initialize_processes()
all_devices()
sys.stdin.read()
"""


def test_a_process_that_fails_alone_ends_at_once(tmp_path, free_port):
    """JAX would have it wait for the others, who wait for it; no launcher would see why."""
    joins = {"PREFIXMEM_COORDINATOR": f"127.0.0.1:{free_port}", "PREFIXMEM_PROCESSES": "2"}
    other = python_process(STAYS, **joins, PREFIXMEM_PROCESS_ID="0")
    fails = f"import sys; from prefixmem_jax import cli; sys.exit(cli.main(['evaluate', '{tmp_path}', '--distributed']))"
    process = python_process(fails, **joins, PREFIXMEM_PROCESS_ID="1")
    try:
        output, errors = process.communicate(timeout=60)
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    assert (output, process.returncode) == ("", 2)
    assert errors == f"prefixmem: {tmp_path}: not a run directory (it has no config.json)\n"


def slurm(number: int, processes: int, port: int) -> dict[str, str]:
    """What Slurm tells a process, and the port that JAX would else make of the job's number."""
    return {
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


def gke(number: int, processes: int, port: int) -> dict[str, str]:
    """What GKE tells a process of TPU slices with one machine each."""
    return {
        "JAX_FORCE_TPU_INIT": "1",  # as if there were chips
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": str(processes),
        "MEGASCALE_SLICE_ID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.mark.parametrize("cluster", [slurm, gke])
def test_clusters_tell_who_is_missing(cluster, free_port):
    processes = [python_process(JOIN, **cluster(number, 3, free_port)) for number in (0, 2)]
    for process in processes:
        output, errors = process.communicate(timeout=100)
        assert (output, process.returncode) == ("", 2)
        words = "process 1 of 3 did not come within 2 s (they count from 0)"
        assert errors == f"prefixmem: --distributed: {words}\n"


COUNT = """
import jax
from prefixmem_jax.parallel import mesh
mesh.initialize_processes()
print(jax.process_index(), jax.process_count(), len(jax.devices()))
"""


@pytest.mark.parametrize("cluster", [slurm, gke])
def test_processes_of_a_cluster_come_together(cluster, free_port):
    one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [python_process(COUNT, **cluster(n, 2, free_port), **one_device) for n in (0, 1)]
    for number, process in enumerate(processes):
        output, errors = process.communicate(timeout=100)
        assert output == f"{number} 2 2\n", errors


def test_where_there_is_no_cluster_it_says_what_to_set():
    output, errors = python_process(JOIN).communicate(timeout=100)
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith("prefixmem: --distributed: no TPU pod, Slurm, GKE or MPI here; use ")
