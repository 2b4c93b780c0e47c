"""The launchers of launch/: what they would run, and what they do when a process fails, sticks or is stopped.

What `--dry_run` prints is compared with tests/golden/launch/. After a change that is meant, renew the files:

    MMGEN_GOLDEN=write pytest tests/test_launch.py -k golden
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmgen.runtime import config as configs
from tests.conftest import ROOT, records

RUN = ["--", "--config", "transformer:7b", "--workdir", "/mnt/runs/7b", "--config.data.shards=/mnt/it's here"]
POD = ["--name", "pod", "--zone", "us-east5-a", "--accelerator-type", "v5p-128"]
POD += ["--runtime-version", "v2-alpha-tpuv5", "--package", "mmgen[tpu] @ git+https://host/mmgen"]
GKE = ["--image", "registry/mmgen:1", "--claim", "shared"]
DATA = [argument.replace("/mnt", "/data") for argument in RUN]
GOLDEN = {
    "local-one": ["local", *RUN],
    "local-cpu": ["local", "--processes", "4", *RUN],
    "local-gpus": ["local", "--processes", "2", *RUN],
    "slurm": [
        "slurm",
        "--nodes",
        "4",
        "--partition",
        "gpu",
        "--account",
        "me",
        "--venv",
        "/opt/my venv",
        *RUN,
    ],
    "slurm-cpu": ["slurm", "--gpus-per-node", "0", "--retries", "0", "--name", "mine", *RUN],
    "tpu": ["tpu", *POD, "--project", "p", "--spot", "--before", "sudo mount s:/share /mnt", *RUN],
    "tpu-slices": ["tpu", *POD, "--slices", "2", *RUN],
    "gke-tpu": [
        "gke",
        "--tpu",
        "tpu-v5p-slice",
        "--topology",
        "4x4x4",
        "--slices",
        "2",
        "--spot",
        *GKE,
        *DATA,
    ],
    "gke-gpu": ["gke", "--gpu", "nvidia-h100-80gb", "--nodes", "2", *GKE, *DATA],
}


def launch(name, *arguments, **environment):
    """Starts a launcher -> Popen, its output and errors together as text."""
    environment = (
        os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | environment
    )
    return subprocess.Popen(
        [sys.executable, ROOT / "launch" / f"{name}.py", *map(str, arguments)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def hear_interrupts():
    """A shell starts what it runs in the background with SIGINT ignored, and programs pass that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def finish(process, within=120):
    """(exit status, output), in so many seconds at most."""
    try:
        output, _ = process.communicate(timeout=within)
    finally:
        process.kill()
    return process.returncode, output


def compare_golden(path, text):
    """Compares a text with a file of tests/golden/, or writes the file where MMGEN_GOLDEN=write."""
    if os.environ.get("MMGEN_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path} differs; if that is meant: MMGEN_GOLDEN=write pytest ... -k golden"
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, tmp_path):
    script, *arguments = GOLDEN[name]
    gpus = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,2,3"} if name == "local-gpus" else {}
    nothing = tmp_path / "nothing"  # where sbatch, gcloud and kubectl cannot be found
    status, output = finish(launch(script, "--dry_run", *arguments, PATH=str(nothing), **gpus))
    assert status == 0, output
    output = output.replace(sys.executable, "python")
    if script == "gke":
        check_jobset(json.loads(output))
    else:
        subprocess.run(["bash", "-n"], input=output, text=True, check=True)
    compare_golden(ROOT / "tests" / "golden" / "launch" / f"{name}.txt", output)


def check_jobset(jobset):
    """What Kubernetes demands of a set and its job beyond what each field says."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completions"] == job["parallelism"] and pod["restartPolicy"] == "Never"
    names = {container["name"] for container in pod["containers"]}
    assert {
        rule.get("onExitCodes", {}).get("containerName", "train") for rule in job["podFailurePolicy"]["rules"]
    } == names
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["local"], "found no `--`"),
        (["local", "--config", "tokenizer:tiny", "--workdir", "x"], "unrecognized arguments"),
        (["local", "--dry-run", *RUN], "unrecognized arguments: --dry-run"),
        (["local", "--"], "a --config is expected; found nothing"),
        (["local", "--", "--config", "tokenizer:tiny"], "a --workdir is expected"),
        (["local", "--processes", "0", *RUN], "at least 1; found '0'"),
        (["local", "--processes", "two", *RUN], "at least 1; found 'two'"),
        (["local", "--command", "no-such-program", "--"], "a program that can be found"),
        (["slurm", "--partition", "gpu\n#SBATCH --nodes=99", *RUN], "expected one word"),
        (["tpu", *POD, "--", "--config", "a", "--workdir", "runs/a"], "must be an absolute path"),
        (["gke", "--gpu", "nvidia-l4", *GKE, *RUN], "must be in /data"),
        (["gke", "--tpu", "tpu-v5p-slice", *GKE, *DATA], "shape of the TPU slice"),
        (["gke", "--tpu", "tpu-v5p-slice", "--topology", "3x3", *GKE, *DATA], "9 chips"),
        (["gke", *GKE, *RUN], "--tpu --gpu is required"),
    ],
)  # fmt: skip
def test_mistakes(arguments, words):
    status, output = finish(launch(*arguments))
    assert status == 2 and words in output.replace("\n", " "), output


def test_gpus_that_cannot_be_shared():
    process = launch("local", "--processes", 2, *RUN, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="0,1,2")
    status, output = finish(process)
    assert status == 2 and "found 3;" in output


# -- processes that are watched: each says who it is in a file, and then does what it is told

CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank = int(os.environ.get("MMGEN_DISTRIBUTED", "0/1").split("/")[0])
folder, part = Path(sys.argv[1]), sys.argv[2:][rank]
def save(number, frame):
    print("saving", signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN if part == "deaf" else save)
worker = subprocess.Popen(["sleep", "600"])  # as a loader's worker, which does not end by itself
(folder / f"{rank}.new").write_text(f"{os.getpid()} {worker.pid}")
(folder / f"{rank}.new").rename(folder / str(rank))
with (folder / "starts").open("a") as starts:
    starts.write(f"{rank}\\n")
while not (part[-1].isdigit() and (folder / "go").exists()):
    time.sleep(.01)
    if part == "chatty":
        print("still here", flush=True)
if part.startswith("slow"):
    time.sleep(.3)
os._exit(int(part[-1] if part.startswith("slow") else part))
"""


def watch(folder, *parts, flags=()):
    """Starts children that do `parts` -> (the launcher, [their process number and their worker's, each])."""
    (folder / "child.py").write_text(CHILD)
    process = launch(
        "local", "--processes", len(parts), "--grace", 0.5, *flags, "--command", sys.executable,
        "--", folder / "child.py", folder, *parts,
    )  # fmt: skip
    files = [folder / str(rank) for rank in range(len(parts))]
    until(lambda: all(file.exists() for file in files))
    return process, [[int(number) for number in file.read_text().split()] for file in files]


def until(true, within=20):
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pids):
    """Whether all of them have ended; one that nobody has reaped yet counts."""
    for pid in sum(pids, []):
        try:
            if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX":
                return False
        except OSError:
            pass
    return True


@pytest.mark.parametrize(
    "parts, stopped, status, words",
    [
        (["wait", "3", "wait"], None, 3, ["process 1 ended with status 3", "[0] saving SIGTERM"]),
        (["deaf", "3"], None, 3, ["SIGTERM to process 0", "SIGKILL to process 0"]),
        (["wait", "3", "wait"], 2, 3, ["SIGKILL to process 2"]),  # a stopped process does not hear SIGTERM
        (["0", "wait"], None, 75, ["process 0 ended with status 0", "[1] saving SIGTERM"]),
        (["0", "wait"], 1, 137, ["SIGKILL to process 1"]),
        (["75", "75"], None, 75, ["process 0 ended with status 75"]),
        (["0", "0"], None, 0, ["process 1 ended with status 0"]),
    ],
)
def test_when_one_has_ended_the_others_do(tmp_path, parts, stopped, status, words):
    process, pids = watch(tmp_path, *parts)
    if stopped is not None:
        os.kill(pids[stopped][0], signal.SIGSTOP)
    (tmp_path / "go").touch()
    found, output = finish(process, within=5)
    assert found == status and all(word in output for word in words), output
    assert gone(pids)


@pytest.mark.parametrize("first", ["0", "75"])
def test_who_is_a_little_slower_is_left_alone(tmp_path, first):
    process, _ = watch(tmp_path, first, "slow0", flags=("--grace", 20))
    (tmp_path / "go").touch()
    status, output = finish(process, within=10)
    assert status == int(first) and "process 1 ended with status 0" in output and "SIGTERM" not in output


def test_one_that_is_killed(tmp_path):
    process, pids = watch(tmp_path, "wait", "wait")
    os.kill(pids[1][0], signal.SIGKILL)
    status, output = finish(process, within=5)
    assert status == 137 and "[0] saving SIGTERM" in output and gone(pids)


@pytest.mark.parametrize(
    "number, heard", [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "SIGTERM")]
)
def test_a_signal_reaches_all_and_is_no_reason_to_start_again(tmp_path, number, heard):
    process, pids = watch(tmp_path, "wait", "wait", flags=("--retries", 3))
    process.send_signal(number)
    status, output = finish(process, within=5)
    assert status == 75 and f"[0] saving {heard}" in output and f"[1] saving {heard}" in output
    assert "starting again" not in output and gone(pids)


def test_a_second_interrupt_kills(tmp_path):
    process, pids = watch(tmp_path, "deaf", "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process, within=5)[0] == 137 and gone(pids)


@pytest.mark.parametrize("parts", [["3"], ["wait", "75"]])
def test_it_starts_again_so_many_times(tmp_path, parts):
    (tmp_path / "go").touch()
    process, _ = watch(tmp_path, *parts, flags=("--retries", 2))
    status, output = finish(process, within=10)
    assert status == int(parts[-1]) and output.count("starting again") == 2
    starts = (tmp_path / "starts").read_text().split()
    assert [starts.count(str(rank)) for rank in range(len(parts))] == [3] * len(parts)


def test_nothing_trains_on_when_the_launcher_is_killed(tmp_path):
    process, pids = watch(tmp_path, "chatty", "chatty")
    process.kill()
    until(lambda: gone([pid[:1] for pid in pids]))
    os.kill(pids[0][1], signal.SIGKILL)
    os.kill(pids[1][1], signal.SIGKILL)


# -- other places, played by scripts of the same name


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(name, text): a Bash script of this name is found first from now on; it runs in tmp_path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def play(name, text):
        (tmp_path / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / name).chmod(0o755)

    return play


@pytest.mark.parametrize(
    "ends, signalled, status, runs, requeued",
    [
        (["0"], False, 0, 1, False),
        (["1", "0"], False, 0, 2, False),
        (["1"] * 4, False, 1, 3, False),
        (["75"], False, 75, 1, True),
        (["usr1 75"], True, 75, 1, True),
        (["usr1 137"], True, 137, 1, True),  # the first task that saved had the others killed
        (["usr1 0"], True, 0, 1, False),  # it was about to be done
    ],
)
def test_the_batch_script(play, tmp_path, ends, signalled, status, runs, requeued):
    """Under Bash, with an srun that ends so; `usr1` waits until the batch shell has passed its signal on."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    play("sbatch", "cat > script; echo submitted")
    flags = ["--venv", tmp_path, "--retries", 2, "--gpus-per-node", 2]
    status_of, output = finish(launch("slurm", *flags, *RUN))
    assert status_of == 0 and "submitted" in output
    (tmp_path / "ends").write_text("\n".join(ends) + "\n")
    play(
        "srun",
        "printf '%s\\n' \"$@\" > arguments; echo $MMGEN_DISTRIBUTED $JAX_LOCAL_DEVICE_IDS >> runs\n"
        "read -r how < ends; sed -i 1d ends\n"
        "if [[ $how == usr1* ]]; then\n"
        "  trap 'sleep .2; exit ${how#usr1 }' USR1; touch waits; while :; do sleep .05; done\nfi\n"
        "exit $how\n",
    )
    play("scontrol", 'echo "$@" > requeued')
    batch = subprocess.Popen(["bash", "script"], env=os.environ | {"SLURM_JOB_ID": "42"})
    if signalled:
        until((tmp_path / "waits").exists)
        batch.send_signal(signal.SIGUSR1)
    assert batch.wait(10) == status
    assert (tmp_path / "runs").read_text().split("\n")[:-1] == ["auto 0,1"] * runs
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    arguments = (tmp_path / "arguments").read_text().split("\n")[:-1]
    assert arguments[arguments.index("mmgen") :] == ["mmgen", "train", *RUN[1:]]  # quoted as it should be


GCLOUD = """
verb=$4
echo "$verb" >> calls
state=$(cat state)
case $verb in
  describe) [[ -n $state ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }; echo "$state" ;;
  delete) echo "" > state ;;
  create) echo ACTIVE > state ;;
  ssh) command=${@: -1}; command=${command#--command=}
    [[ $command != *'uv pip install'* ]] || exit 0
    # two hosts; as gcloud does, it waits for both
    HOST=0 bash -c "$command" & first=$!
    HOST=1 bash -c "$command" & second=$!
    wait $first; a=$?; wait $second; b=$?
    exit $((a ? a : b)) ;;
esac
"""
HOST = """#!{python}
import os, sys, time
from pathlib import Path
here = Path("{folder}")
assert sys.argv[1] == "train" and os.environ["MMGEN_DISTRIBUTED"] == "auto"
mine = here / ("ends" + os.environ["HOST"])
how, *rest = mine.read_text().split()
mine.write_text(" ".join(rest))
if how == "lost":  # the machine is taken away
    (here / "state").write_text("SUSPENDED")
    how = "1"
if how == "stuck":
    import signal
    os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(int(how))
"""


@pytest.mark.skipif(not shutil.which("pkill"), reason="pkill is not installed")
@pytest.mark.parametrize(
    "before, ends, status, verbs",
    [
        ("", ["0", "0"], 0, "describe create describe"),
        ("ACTIVE", ["0", "0"], 0, "describe"),
        ("SUSPENDED", ["0", "0"], 0, "describe delete create describe"),
        ("ACTIVE", ["1 0", "1 0"], 0, "describe describe"),
        ("ACTIVE", ["lost 0", "1 0"], 0, "describe describe delete create describe"),
        ("ACTIVE", ["75", "75"], 75, "describe describe"),
        ("ACTIVE", ["1 0", "stuck 0"], 0, "describe describe"),
        ("ACTIVE", ["1 1", "1 1"], 1, "describe describe"),
    ],
)
def test_a_pod_is_found_or_made_and_started_again(play, tmp_path, before, ends, status, verbs):
    venv = tmp_path / "mmgen-venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").symlink_to(sys.executable)
    (venv / "mmgen").write_text(HOST.format(python=venv / "python", folder=tmp_path))
    (venv / "mmgen").chmod(0o755)
    (tmp_path / "state").write_text(before)
    for host, how in enumerate(ends):
        (tmp_path / f"ends{host}").write_text(how)
    play("gcloud", GCLOUD)
    flags = [*POD, "--poll", 0.01, "--grace", 1, "--retries", 1]
    found, output = finish(launch("tpu", *flags, *RUN, HOME=str(tmp_path)), within=20)
    assert found == status, output
    calls = (tmp_path / "calls").read_text().split()
    assert [call for call in calls if call != "ssh"] == verbs.split(), output
    assert "queued-resources delete pod" in output.splitlines()[-1]


@pytest.mark.parametrize("state, deleted", [("", False), ("Completed", True), ("Failed", True)])
def test_a_jobset_that_has_ended_makes_room(play, tmp_path, state, deleted):
    play(
        "kubectl",
        f'echo "$1 $2" >> calls; [[ $1 != get ]] || echo -n "{state}"; [[ $1 != apply ]] || cat > applied',
    )
    arguments = GOLDEN["gke-gpu"][1:]
    status, output = finish(launch("gke", *arguments))
    assert status == 0, output
    calls = (tmp_path / "calls").read_text()
    assert ("delete jobset" in calls) == deleted and calls.endswith("apply --filename=-\n")
    check_jobset(json.loads((tmp_path / "applied").read_text()))


# -- the real thing


FLAGS = ["--config", "tokenizer:tiny", "--config.mesh.data=2", "--config.data.source.documents=16"]


def train(workdir, *more, processes=2, flags=(), **environment):
    """Starts a run of one process with two devices, or of several with one each."""
    devices = ("--processes", processes, "--devices-per-process", 2 if processes == 1 else 1)
    return launch("local", *devices, *flags, "--", *FLAGS, *more, "--workdir", workdir, **environment)


@pytest.mark.soak
def test_two_processes_train_as_one_does_and_go_on(tmp_path):
    more = ["--config.steps=4", "--config.log_every=1", "--config.save_every=2"]
    status, output = finish(train(tmp_path / "one", *more, processes=1), within=300)
    assert status == 0, output
    status, output = finish(train(tmp_path / "two", *more), within=300)
    assert status == 0 and "[1] " in output, output
    expected, found = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    names = ("loss", "grad_norm", "batch_psnr")
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose([a[name] for name in names], [b[name] for name in names], rtol=2e-4)
    status, output = finish(train(tmp_path / "two", *more), within=300)  # there is nothing left to do
    assert status == 0 and "steps 4 -> 4" in output and records(tmp_path / "two") == found


@pytest.mark.soak
def test_a_real_run_that_is_told_to_stop_and_one_that_is_stuck(tmp_path):
    """Of four processes: the run saves and ends with 75; goes on; and a frozen process ends it."""
    more = ["--config.mesh.data=4", "--config.steps=100000", "--config.log_every=20", "--config.step_limit=25"]
    more += ["--config.save_every=100000"]  # a process that freezes while it saves is given longer
    log = tmp_path / "log"

    def started():
        process = train(tmp_path / "run", *more, processes=4, flags=("--grace", 5))
        with open(log, "a") as copy:
            for line in process.stdout:
                copy.write(line)
                if line.startswith("[0] step "):
                    return process
        raise AssertionError(log.read_text())

    process = started()
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 75, output
    process = started()
    assert (
        "steps 0 -> 100000" in log.read_text() and log.read_text().count("steps 0 ->") == 4
    )  # a line a process
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True
    ).stdout.split()
    os.kill(int(children[1]), signal.SIGSTOP)
    status, output = finish(process, within=120)
    assert status == 1 and "Timeout (0:00:25)!" in output and "SIGKILL to process 1" in output, output


def test_each_part_of_the_reference_gets_the_sources_that_its_mixture_names(tmp_path):
    """What launch/reference.sh calls, by an mmgen that only notes it."""
    (tmp_path / "mmgen").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "mmgen").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / "launch/reference.sh", tmp_path / "run"], check=True, env=os.environ | {"PATH": path})
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    made = {words[words.index("--out") + 1] for words in calls if words[0] == "tokenize"}
    parts = 0
    for words in calls:
        if words[0] == "train" and words[2].startswith("transformer:"):
            (shards,) = [word.partition("=")[2].split(",") for word in words if word.startswith("--config.data.shards=")]
            assert set(shards) <= made
            names = {shard.rpartition("/")[2] for shard in shards}
            assert names == {name for name, _ in configs.load(words[2]).data.mixture}
            parts += 1
    assert parts == 6 and calls[-1][:2] == ["tools", "pack"]
