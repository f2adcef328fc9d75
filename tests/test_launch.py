"""The launch scripts: what they print, and what they call, with stand-ins for what is not to be had."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from string import Template

import pytest
import yaml
from conftest import ROOT, command_environment
from packaging.specifiers import SpecifierSet

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
RUN = ("configs/recommend/base.py", "--out", "gs://bucket/run", "data.path=gs://bucket/a b")


def launch(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [LAUNCH / name, *arguments],
        env=given | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n{script}\n')
    (folder / name).chmod(0o755)


def only_noted(folder: Path) -> str:
    """A PATH on which commands of clusters only note that they were called."""
    for name in ("gcloud", "kubectl", "srun", "scontrol", "prefixmem", "git"):
        stand_in(folder, name, "")
    return f"{folder}:{os.environ['PATH']}"


# What each launcher is given; what it prints then is in launch_dry_runs.
DRY_RUNS = {
    "local.sh": ({}, ("recommend/base", "--processes", "3", "--out", "the runs/one", "steps=5")),
    "tpu_vm.sh": ({**QUEUED, "PROJECT": "project"}, (*RUN, "--logs", "the logs")),
    "tpu_queued_resource.sh": (
        {**QUEUED, "SPOT": "yes", "LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"},
        (RUN[0], "--out", "/mnt/all/run"),
    ),
    "gke.sh": (GKE, (*RUN, 'name="a\\b"')),
    "slurm.sbatch": ({}, ("recommend/base", "--out", "/shared/run", "data.path=/shared/a b")),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_exactly_what_would_run(tmp_path, name):
    """And runs nothing. Where a launcher was changed: its dry run, with the repository's path as
    REPOSITORY, is what the file is to say.
    """
    environment, arguments = DRY_RUNS[name]
    path = only_noted(tmp_path / "bin")
    done = launch(name, *arguments, "--dry-run", **environment, PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    expected = (ROOT / "tests" / "launch_dry_runs" / name).with_suffix(".txt").read_text()
    assert done.stdout.replace(str(ROOT), "REPOSITORY") == expected
    assert not (tmp_path / "bin" / "called").exists()


def test_scripts_have_no_mistakes_that_shellcheck_finds():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / "tests" / "run.sh"]
    done = subprocess.run(
        ["shellcheck", "-x", *scripts],
        env=command_environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# A training of a second.
TINY = (
    "data.synthetic.items=100", "data.synthetic.users=100", "data.batch_size=4",
    "data.sequence_length=64", "model.layers=1", "model.d_model=16", "model.d_ff=16",
    "evaluation.every_steps=9", "evaluation.validation_examples=4", "log_every_steps=1",
)  # fmt: skip


def test_a_run_of_two_processes_goes_on_in_four(tmp_path):
    """For real, each to its end: whole checkpoints, and records of the first process alone."""
    run, without = tmp_path / "run", tmp_path / "without"
    without.mkdir()
    # A run needs no torch; where there is one tensorboardX imports it, for seconds.
    (without / "torch.py").write_text("raise ImportError\n")
    environment = command_environment() | {"PYTHONPATH": str(without)}
    for processes, steps in ((2, 2), (4, 4)):
        done = subprocess.run(
            [LAUNCH / "local.sh", QUICKSTART / "baseline.py", "--processes", str(processes),
             "--out", run, *TINY, f"steps={steps}"],
            env=environment, timeout=280, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"trained baseline for {steps} steps" in done.stdout + done.stderr
        assert saved_steps(run)[0] == steps and not find_damage(run, steps)
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in read_metrics(run) if "validation/loss" in r] == [2, 4]


def test_local_launcher_leaves_nobody_behind(tmp_path):
    """A process whose peer is gone waits for it, whoever tells it to end, and keeps the run's lock.

    What the peer said last is in the one line that says so, and what another one had ended with that
    waits too.
    """
    stand_in(
        tmp_path, "prefixmem",
        f"""trap '' TERM
        echo $$ > {tmp_path}/pid-$PREFIXMEM_PROCESS_ID
        case $PREFIXMEM_PROCESS_ID in
          1) sleep 1; printf 'some progress\\rits peer is gone\\n\\n' >&2; exit 7 ;;
          2) echo 'prefixmem: no space' >&2 ;;
          3) echo '3 of 9 steps' >&2 ;;
        esac
        exec sleep 60""",
    )  # fmt: skip
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("local.sh", "c.py", "--processes", "4", "--out", "run", PATH=path)
    assert done.returncode == 7
    begun, *ended = done.stderr.splitlines()
    logs = begun.rpartition(" ")[2]
    assert ended == [
        "local.sh: process 1 failed with status 7; stopping the others "
        f"(logs: {logs}). It said: its peer is gone",
        "local.sh: process 2 said: prefixmem: no space",
    ]
    pids = [path.read_text().strip() for path in tmp_path.glob("pid-*")]
    assert len(pids) == 4 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("verb", ["train", "evaluate", "recommend", "export"])
def test_local_launcher_runs_a_verb_in_each_process(tmp_path, verb):
    """And interrupted it ends as such: only a training may take its time."""
    stand_in(
        tmp_path, "prefixmem",
        "trap 'exit 143' TERM; echo up >> $0.up; while :; do sleep 0.05; done",
    )  # fmt: skip
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "local.sh", verb, "RUN", "--processes", "2", "--out", "x"]
    launcher = subprocess.Popen(command, env=environment)
    up = tmp_path / "prefixmem.up"
    while not up.exists() or up.read_text().count("up") < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    called = (tmp_path / "called").read_text().splitlines()
    assert called == [f"prefixmem {verb} RUN --out x --distributed"] * 2


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


@pytest.fixture
def cloud(tmp_path) -> Path:
    """A folder `bin` with a stand-in for gcloud, and `pod`, which is the disk of both workers.

    There is a queued TPU in the states that `states` lists; the training ends with status 3.
    """
    remote = tmp_path / "pod"
    (remote / "prefixmem_jax" / ".venv" / "bin").mkdir(parents=True)
    stand_in(remote / "prefixmem_jax" / ".venv" / "bin", "prefixmem",
             'echo "$LIBTPU_INIT_ARGS" in "$JAX_COMPILATION_CACHE_DIR"; echo failed >&2; exit 3')  # fmt: skip
    stand_in(
        tmp_path / "bin", "gcloud",
        f"""for last; do :; done
        case "$*" in
          *"queued-resources describe"*)
            head -n 1 {tmp_path}/states
            [ $(wc -l < {tmp_path}/states) -le 1 ] || sed -i 1d {tmp_path}/states ;;
          *"tpu-vm describe"*) echo 2 ;;
          *set_up*) ;;
          *"tpu-vm ssh"*) cd {remote} && exec bash -c "$last" ;;
          *"tpu-vm scp pod:"*) cp {remote}/"${{5#pod:}}" "$6" ;;
        esac""",
    )  # fmt: skip
    return tmp_path


def called(cloud: Path) -> list[str]:
    return (cloud / "bin" / "called").read_text().splitlines()


@pytest.mark.parametrize(
    "states, status, trains",
    [(["WAITING", "ACTIVE"], 3, True), (["FAILED"], 1, False), (["WAITING"], 1, False)],
)
def test_a_queued_tpu_is_waited_for_and_given_back(cloud, states, status, trains):
    """Whether it comes, fails, or does not come in time; the workers' logs are fetched before."""
    (cloud / "states").write_text("\n".join(states) + "\n")
    logs = cloud / "logs"
    done = launch(
        "tpu_queued_resource.sh", *RUN, "--logs", str(logs), **QUEUED,
        PATH=f"{cloud}/bin:{os.environ['PATH']}", POLL_SECONDS="0", WAIT_HOURS="1",
        LIBTPU_INIT_ARGS="--xla_a=1",
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "queued-resources create" in called(cloud)[0]
    assert "queued-resources delete" in called(cloud)[-1]
    assert any("prefixmem train" in line for line in called(cloud)) == trains
    if trains:
        written = "--xla_a=1 in gs://bucket/programs\nfailed\n"
        assert done.stdout == written
        assert {path.name: path.read_text() for path in logs.iterdir()} == {
            "worker-0.log": written, "worker-1.log": written
        }  # fmt: skip
    else:
        assert not logs.exists()


def test_logs_of_workers_are_followed_and_fetched(cloud):
    """From elsewhere than where the training was started."""
    (cloud / "pod" / "prefixmem_jax" / "train.log").write_text("step 1\nstep 2\n")
    stand_in(cloud / "bin", "tail", "cat $4")  # the real one goes on
    environment = {**QUEUED, "PATH": f"{cloud}/bin:{os.environ['PATH']}"}
    done = launch("tpu_vm.sh", "--tail", **environment)
    assert (done.returncode, done.stdout) == (0, "step 1\nstep 2\n")
    done = launch("tpu_vm.sh", "--logs", str(cloud / "logs"), **environment)
    assert done.returncode == 0
    assert (cloud / "logs" / "worker-1.log").read_text() == "step 1\nstep 2\n"
    (cloud / "pod" / "prefixmem_jax" / "train.log").unlink()
    assert launch("tpu_vm.sh", "--logs", str(cloud / "logs"), **environment).returncode == 1
    assert not any("prefixmem train" in line for line in called(cloud))


def test_a_jobset_trains_what_it_is_told(tmp_path):
    """As Kubernetes reads it."""
    stand_in(tmp_path, "kubectl", f"cat > {tmp_path}/created")
    path = f"{tmp_path}:{os.environ['PATH']}"
    named = {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2", "JAX_COMPILATION_CACHE_DIR": "/programs"}
    launch("gke.sh", *RUN, 'name="a\\b"', **GKE, **named, SLICES="2", PATH=path)
    (job,) = yaml.safe_load((tmp_path / "created").read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["train", *RUN, 'name="a\\b"', "--distributed"]
    assert {variable["name"]: variable["value"] for variable in container["env"]} == named
    assert container["resources"] == {"limits": {"google.com/tpu": 4}} and job["replicas"] == 2


@pytest.mark.parametrize(
    "name, environment, arguments, words",
    [
        ("tpu_queued_resource.sh", {**QUEUED, "ACCELERATOR": ""}, RUN, "set ACCELERATOR"),
        ("tpu_queued_resource.sh", QUEUED, RUN[:1], "--out is needed"),
        ("tpu_queued_resource.sh", QUEUED, ("none.py", *RUN[1:]), "no such file"),
        ("tpu_vm.sh", {"TPU_NAME": "pod"}, RUN, "set ZONE"),
        ("tpu_vm.sh", QUEUED, (*RUN, "--tail"), "--tail stands alone"),
        ("tpu_vm.sh", QUEUED, ("--logs",), "--logs: expected a folder"),
        ("slurm.sbatch", {}, ("recommend/base",), "--out is needed"),
        ("slurm.sbatch", {}, RUN, "not within a Slurm job"),
        ("local.sh", {}, (*RUN, "--processes", "0"), "--processes: expected a number from 1"),
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


def test_a_pod_trains_a_config_by_its_name():
    done = launch("tpu_vm.sh", "recommend/base", "--out", "gs://b/run", "--dry-run", **QUEUED)
    assert done.returncode == 0 and "recommend/base" in done.stdout.splitlines()[-1]


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, in order; what goes on over lines is one."""
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_has_what_the_package_needs(tmp_path):
    """Every line of the Dockerfile is done here: in an empty folder, without base and dependencies."""
    source, target = tmp_path / "source", tmp_path / "target"
    environment, built_with, command = command_environment(), {}, []
    for word, rest in instructions():
        match word:
            case "FROM":
                python = re.fullmatch(r"python:(\d+\.\d+)-slim", rest).group(1)
            case "ARG":
                name, _, default = rest.partition("=")
                built_with[name] = default
            case "WORKDIR":
                assert Path(rest).is_absolute()
                source.mkdir()
            case "COPY":
                *names, where = rest.split()
                for name in names:
                    subprocess.run(["cp", "-r", ROOT / name, source / where], check=True)
            case "RUN":
                pip, install, *options, what = shlex.split(Template(rest).substitute(built_with))
                assert (pip, install) == ("pip", "install")
                where, extras = re.fullmatch(r"(.+)\[(.+)\]", what).groups()
                subprocess.run(
                    ["python", "-m", "pip", "install", *options, "--quiet", "--no-deps",
                     "--no-build-isolation", "--target", target, where],
                    check=True, env=environment, cwd=source,
                )  # fmt: skip
            case "ENTRYPOINT" | "CMD":
                command += json.loads(rest)
            case _:
                pytest.fail(f"{word}: no test does this")
    (installed,) = importlib.metadata.distributions(name="prefixmem_jax", path=[str(target)])
    about = installed.metadata
    assert SpecifierSet(about["Requires-Python"]).contains(python)
    others = re.findall(r"EXTRAS=(\S+)", (LAUNCH / "Dockerfile").read_text())
    for extra in ",".join([extras, *others]).split(","):
        assert extra in about.get_all("Provides-Extra"), extra
    environment |= {"PYTHONPATH": str(target), "PATH": f"{target}/bin:{environment['PATH']}"}
    assert shutil.which(command[0], path=environment["PATH"]) == f"{target}/bin/prefixmem"
    within = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    shown = subprocess.run(command, check=True, **within).stdout
    assert command[1:] == ["--help"] and shown.startswith("usage: prefixmem")
    script = (
        "from prefixmem_jax.config_files import load_config as l; "
        "print(l('recommend/base').name, l('qwen3_1p7b/prefixmem').name)"
    )
    listed = subprocess.run(["python", "-c", script], check=True, **within)
    assert listed.stdout.split() == ["recommend", "qwen3_1p7b_prefixmem"]


def test_the_image_is_built():
    """Without the TPU's build of JAX, which is large."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("needs docker, and its daemon")
    build = [docker, "build", "-q", "-f", LAUNCH / "Dockerfile", "--build-arg", "EXTRAS=gcs", ROOT]
    image = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
    shown = subprocess.run([docker, "run", "--rm", image], capture_output=True, text=True)
    assert shown.stdout.startswith("usage: prefixmem"), shown.stderr
