"""The launch scripts: what they print, and what they call, with stand-ins for what is not to be had."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command_environment

from prefixmem_jax.runs.checkpoint import saved_steps
from prefixmem_jax.runs.checksums import find_damage
from prefixmem_jax.runs.metrics import read_metrics

LAUNCH = ROOT / "launch"
QUICKSTART = ROOT / "configs" / "quickstart"
QUEUED = {"TPU_NAME": "pod", "ZONE": "z", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2"}
GKE = {
    "NAME": "one", "IMAGE": "registry/prefixmem", "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS": "4",
}  # fmt: skip


# A training of a second.
TINY = (
    "data.synthetic.items=100", "data.synthetic.users=100", "data.batch_size=4",
    "data.sequence_length=64", "model.layers=1", "model.d_model=16", "model.d_ff=16",
    "evaluation.every_steps=9", "evaluation.validation_examples=4", "log_every_steps=1",
)  # fmt: skip


def test_a_run_of_two_processes_goes_on_in_four(tmp_path):
    """For real, each to its end: whole checkpoints, and records of the first process alone."""
    run = tmp_path / "run"
    for processes, steps in ((2, 2), (4, 4)):
        done = subprocess.run(
            [LAUNCH / "local.sh", QUICKSTART / "baseline.py", "--processes", str(processes),
             "--out", run, *TINY, f"steps={steps}"],
            env=command_environment(), timeout=280, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"trained baseline for {steps} steps" in done.stdout + done.stderr
        assert saved_steps(run)[0] == steps and not find_damage(run, steps)
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in read_metrics(run) if "validation/loss" in r] == [2, 4]


def test_local_launcher_leaves_nobody_behind(tmp_path):
    """A process whose peer is gone waits for it, whoever tells it to end, and keeps the run's lock.

    What the peer said last is in the one line that says so.
    """
    stand_in(
        tmp_path, "prefixmem",
        f"trap '' TERM; [ $PREFIXMEM_PROCESS_ID = 0 ] || {{ sleep 1; "
        "printf 'some progress\\rprefixmem: no space\\n\\n' >&2; exit 7; }; "
        f"echo $$ > {tmp_path}/pid; exec sleep 60",
    )  # fmt: skip
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("local.sh", "c.py", "--processes", "2", "--out", "run", PATH=path)
    assert done.returncode == 7
    assert done.stderr.count("\n") == 2, done.stderr
    begun, failed = done.stderr.splitlines()
    logs = begun.rpartition(" ")[2]
    assert failed == (
        "local.sh: process 1 failed with status 7; stopping the others "
        f"(logs: {logs}). It said: prefixmem: no space"
    )
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_tpu_launcher_prints_what_it_would_run():
    environment = {**os.environ, "TPU_NAME": "pod", "ZONE": "us-east5-a"}
    done = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", "configs/quickstart/baseline.py", "--dry-run",
         "--out", "/mnt/bucket/run", "steps=5"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("gcloud" in line for line in lines[1:])
    assert "set_up\\ .venv\\ tpu" in lines[2] or "set_up .venv tpu" in lines[2]
    assert "--worker=all" in lines[3] and "us-east5-a" in lines[3]
    assert (
        "train\\ configs/quickstart/baseline.py\\ --distributed\\ --out\\ /mnt/bucket/run\\ steps=5"
        in lines[3]
    )
    missing = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", "configs/quickstart/baseline.py", "--dry-run"],
        env={k: v for k, v in environment.items() if k != "ZONE"}, capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 2 and "set ZONE" in missing.stderr


def test_slurm_launcher_prints_what_it_would_run(tmp_path):
    script = ROOT / "launch" / "slurm.sbatch"
    given = ["recommend/base", "--out", "/shared/run", "data.path=/shared/a b"]
    environment = {key: x for key, x in os.environ.items() if key != "SLURM_JOB_ID"}

    def launch(*arguments):
        return subprocess.run(
            [script, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    done = launch(*given, "--dry-run")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 .venv/bin/prefixmem train recommend/base --out /shared/run "
        "data.path=/shared/a\\ b --distributed ",
        "scontrol requeue JOB   # if it was told to end (status 143)",
    ]
    for arguments, words in (
        (["recommend/base"], "--out is needed"),
        (given, "not within a Slurm job"),
    ):
        done = launch(*arguments)
        assert done.returncode == 2 and words in done.stderr and not done.stdout


@pytest.mark.parametrize("status", [0, 143, 2])
def test_a_slurm_job_that_was_told_to_end_is_queued_again(tmp_path, status):
    """With stand-ins for Slurm's commands, which are not to be had here."""
    for name, line in (("srun", f'"$@"; exit {status}'), ("scontrol", 'echo "$@" > queued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n[ {name} = scontrol ] || shift\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "prefixmem"
    command.write_text('#!/bin/sh\necho "$@" > called\n')
    command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sbatch", "c.py", "--out", "run"], env=environment, cwd=tmp_path
    )
    assert done.returncode == status
    assert (tmp_path / "called").read_text() == "train c.py --out run --distributed\n"
    assert (tmp_path / "queued").exists() == (status == 143)
    if status == 143:
        assert (tmp_path / "queued").read_text() == "requeue 42\n"


def launch(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = {**os.environ, **environment}
    return subprocess.run(
        [LAUNCH / name, *arguments], env=given, capture_output=True, text=True, timeout=60
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n{script}\n')
    (folder / name).chmod(0o755)


RUN = ("configs/recommend/base.py", "--out", "gs://bucket/run", "data.path=gs://bucket/a b")


def test_a_queued_tpu_prints_what_it_would_run():
    lines = launch("tpu_queued_resource.sh", *RUN, "--dry-run", **QUEUED, SPOT="yes").stdout
    lines, within = lines.splitlines(), launch("tpu_vm.sh", *RUN, "--dry-run", **QUEUED).stdout
    ask = "gcloud compute tpus queued-resources"
    assert lines[0].strip() == (
        f"{ask} create pod --node-id pod --zone z --accelerator-type v5litepod-16 "
        "--runtime-version v2 --spot"
    )
    assert lines[1].strip() == f"{ask} describe pod --zone z --format=value\\(state.state\\)"
    assert lines[2:-1] == within.splitlines()
    assert lines[-1].strip() == f"{ask} delete pod --zone z --force --quiet"


@pytest.mark.parametrize(
    "states, status, trains",
    [(["WAITING", "ACTIVE"], 0, True), (["FAILED"], 1, False), (["WAITING"], 1, False)],
)
def test_a_queued_tpu_is_waited_for_and_given_back(tmp_path, states, status, trains):
    """Whether it comes, fails, or does not come in time."""
    answers = "\n".join(states)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "states").write_text(f"{answers}\n")
    stand_in(
        tmp_path / "bin", "gcloud",
        f'case "$*" in *describe*) head -n 1 {tmp_path}/bin/states; '
        f"[ $(wc -l < {tmp_path}/bin/states) -le 1 ] || sed -i 1d {tmp_path}/bin/states;; esac",
    )  # fmt: skip
    done = launch(
        "tpu_queued_resource.sh", *RUN, **QUEUED, PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        POLL_SECONDS="0", WAIT_HOURS="1",
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    called = (tmp_path / "bin" / "called").read_text().splitlines()
    assert "queued-resources create" in called[0] and "queued-resources delete" in called[-1]
    assert any("prefixmem train" in line for line in called) == trains


def test_a_jobset_trains_what_it_is_told(tmp_path):
    done = launch("gke.sh", *RUN, 'name="a\\b"', "--dry-run", **GKE)
    made = yaml.safe_load(done.stdout)
    (job,) = made["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["train", *RUN, 'name="a\\b"', "--distributed"]
    assert container["image"] == "registry/prefixmem" and job["replicas"] == 1
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    assert set(pod["nodeSelector"].values()) == {"tpu-v5-lite-podslice", "4x4"}
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    stand_in(tmp_path, "kubectl", f"cat > {tmp_path}/created")
    launch("gke.sh", *RUN, **GKE, SLICES="2", PATH=f"{tmp_path}:{os.environ['PATH']}")
    (job,) = yaml.safe_load((tmp_path / "created").read_text())["spec"]["replicatedJobs"]
    assert job["replicas"] == 2


@pytest.mark.parametrize(
    "name, environment, arguments, words",
    [
        ("tpu_queued_resource.sh", {**QUEUED, "ACCELERATOR": ""}, RUN, "set ACCELERATOR"),
        ("tpu_queued_resource.sh", QUEUED, RUN[:1], "--out is needed"),
        ("tpu_queued_resource.sh", QUEUED, ("none.py", *RUN[1:]), "no such file"),
        ("gke.sh", {**GKE, "IMAGE": ""}, RUN, "set IMAGE"),
        ("gke.sh", GKE, ("recommend/base", "--out", "/disk"), "--out gs://BUCKET/RUN is needed"),
    ],
)
def test_mistakes_in_launching_are_one_line(tmp_path, name, environment, arguments, words):
    stand_in(tmp_path, "gcloud", "")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch(name, *arguments, **environment, PATH=path)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "called").exists()


def test_the_image_has_what_the_package_needs(tmp_path):
    """What the Dockerfile copies is installed as it says, and the command lists the configs."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for line in lines:
        if line.startswith("COPY "):
            *names, where = line.split()[1:]
            for name in names:
                subprocess.run(["cp", "-r", ROOT / name, source / where], check=True)
    (install,) = (line for line in lines if line.startswith("RUN "))
    assert install == 'RUN pip install --no-cache-dir ".[${EXTRAS}]"'
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT "))
    assert entry == 'ENTRYPOINT ["prefixmem"]'
    environment = command_environment()
    subprocess.run(
        ["python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--target", target, source],
        check=True, env=environment,
    )  # fmt: skip
    listed = subprocess.run(
        ["python", "-c", "from prefixmem_jax.config_files import load_config as l; "
         "print(l('recommend/base').name, l('qwen3_1p7b/prefixmem').name)"],
        env={**environment, "PYTHONPATH": str(target)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.split() == ["recommend", "qwen3_1p7b_prefixmem"]
