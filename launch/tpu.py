"""A run over all hosts of a Cloud TPU slice (or of several), asked for as a queued resource.

    python launch/tpu.py --name v5p --zone us-east5-a \\
        --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 \\
        --package 'mmgen[tpu] @ git+https://HOST/mmgen' --before 'sudo mount SERVER:/share /mnt' -- \\
        --config transformer:7b --workdir /mnt/runs/7b --config.data.shards=/mnt/shards

Needs gcloud here, and keeps running here: start it on a machine that stays on. What is there already is used,
a resource that was preempted or failed is deleted and asked for again, and what still trains there is told to
save first. So run it again, or let it: the run goes on. When the command of one host ends and others do not,
these are told to end after --grace seconds and killed after as many more; then all start again,
--retries times.
The workdir must be on a file system that all hosts see; --before is run on each of them, and can mount it.
The resource remains when the run is done: the last line says how to delete it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import flags

MARK = "launch: this host ended with status "
GONE = ("FAILED", "SUSPENDING", "SUSPENDED")


def main(argv):
    parser = flags.parser(__doc__)
    for flag in ("--name", "--zone", "--accelerator-type", "--runtime-version"):
        parser.add_argument(flag, type=flags.word, required=True)
    parser.add_argument("--project", type=flags.word, help="default: gcloud's own")
    parser.add_argument("--slices", type=flags.count(1), default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument(
        "--package", required=True, help="what pip is to install; a path or address with [tpu]"
    )
    parser.add_argument("--before", default="true", help="a command for every host, run before each start")
    parser.add_argument("--grace", type=flags.count(1), default=120)
    parser.add_argument("--retries", type=flags.count(0), default=10)
    parser.add_argument("--poll", type=float, default=30, help="seconds between two looks at the resource")
    args, training = flags.parse(parser, argv)
    flags.shared_workdir(parser, training)
    commands = gcloud_commands(args, training)

    if args.dry_run:
        print("# Is it there, and in which state?\n" + shlex.join(commands["describe"]))
        print(f"# Where it is {', '.join(GONE)}:\n" + shlex.join(commands["delete"]))
        print("# Where there is none, or was:\n" + shlex.join(commands["create"]))
        print(f"# Every {args.poll:g} seconds until it is ACTIVE the first line again; then, on all hosts:")
        print("\n".join(shlex.join(commands[name]) for name in ("stop", "prepare", "train")))
        return 0
    for left in range(args.retries, -1, -1):
        obtain(commands, args.poll)
        stop(commands, args.grace)
        status = subprocess.run(commands["prepare"]).returncode or train(commands, args.grace)
        if status == 75:  # the machines are being taken away, or somebody stopped the run: time tells
            time.sleep(args.grace)
            if state(commands) == "ACTIVE":
                break
        if status == 0 or not left:
            break
        print(f"launch: status {status}; starting again, {left - 1} more times after this", flush=True)
    print(f"launch: status {status}. To give the TPU back: {shlex.join(commands['delete'])}")
    return status


def gcloud_commands(args, training):
    """{what it does: the command}."""
    base = ["gcloud", "compute", "tpus", "queued-resources"]
    where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]
    nodes = [f"--node-id={args.name}"] if args.slices == 1 else [f"--node-count={args.slices}"]
    kind = [
        f"--accelerator-type={args.accelerator_type}",
        f"--runtime-version={args.runtime_version}",
        *nodes,
    ]
    spot = ["--spot"] if args.spot else []
    # Batches of 64 hosts are gcloud's default, but all must run at once. A host that is gone ends its ssh.
    ssh = [*base, "ssh", args.name, *where, "--node=all", "--worker=all", "--batch-size=all", "--quiet"]
    ssh += ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=10"]
    # SIGTERM lets the run save. The pattern is the process itself, not the shells that say its name.
    found = '-f "^$HOME/mmgen-venv/bin/python[^ ]* $HOME/mmgen-venv/bin/mmgen train"'
    stop = (
        f"pkill -TERM {found}; for i in $(seq {args.grace}); do "
        f"pgrep {found} > /dev/null || exit 0; sleep 1; done; pkill -KILL {found}; exit 0"
    )
    # The images' own Python is 3.10; uv brings one.
    prepare = (
        f"set -eo pipefail; {args.before}; export PATH=$HOME/.local/bin:$PATH; "
        "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; "
        "test -d ~/mmgen-venv || uv venv -q --python 3.12 ~/mmgen-venv; "
        f"uv pip install -q --python ~/mmgen-venv/bin/python {shlex.quote(args.package)}"
    )
    train = "MMGEN_DISTRIBUTED=auto PYTHONUNBUFFERED=1 "
    train += f"~/mmgen-venv/bin/mmgen train {shlex.join(training)}"
    train += f"; status=$?; echo '{MARK}'$status; exit $status"
    return {
        "describe": [*base, "describe", args.name, *where, "--format=value(state.state)"],
        "delete": [*base, "delete", args.name, *where, "--force", "--quiet"],
        "create": [*base, "create", args.name, *where, *kind, *spot],
        "stop": [*ssh, f"--command={stop}"],
        "prepare": [*ssh, f"--command={prepare}"],
        "train": [*ssh, f"--command={train}"],
    }


def state(commands):
    """The state of the queued resource; None where there is none."""
    asked = subprocess.run(commands["describe"], capture_output=True, text=True)
    if asked.returncode and "NOT_FOUND" not in asked.stderr:
        sys.exit(f"launch: cannot ask for the TPU's state; gcloud says:\n{asked.stderr}")
    return asked.stdout.strip() or None


def obtain(commands, poll):
    """Waits until the resource is ACTIVE; asks for it where it is not there or no longer."""
    shown, asked = "", False
    while (now := state(commands)) != "ACTIVE":
        if now == "FAILED" and asked:  # it was not taken away, it cannot be had
            sys.exit(f"launch: the request failed; the reason: {shlex.join(commands['describe'][:-1])}")
        if now in GONE:
            subprocess.run(commands["delete"], check=True)
            now = None
        if now is None:
            subprocess.run(commands["create"], check=True)
            asked = True
        if now != shown:
            print(f"launch: the TPU is {now or 'asked for'}; waiting until it is ACTIVE", flush=True)
        shown = now
        time.sleep(poll)


def stop(commands, grace):
    """Ends what trains on the hosts: told first, then killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # a host that does not answer holds nothing up
        subprocess.run(commands["stop"], timeout=grace + 120)


def train(commands, grace):
    """Trains on all hosts -> the status of the first that did not end with 0.

    gcloud itself waits for every host, however long: from the end of the first one the others are timed.
    """
    status, timer = 0, None
    running = subprocess.Popen(
        commands["train"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip

    def end_the_others():
        stop(commands, grace)
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:  # a host that does not even answer
            os.killpg(running.pid, signal.SIGKILL)

    try:
        for line in running.stdout:
            print(line, end="", flush=True)
            if MARK in line:
                status = status or int(line.rpartition(" ")[2])
                if timer is None:
                    timer = threading.Timer(grace, end_the_others)
                    timer.start()
        return status or running.wait()
    finally:
        if timer:
            timer.cancel()
            timer.join()  # or its `stop` would meet the next start
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
