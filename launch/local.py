"""A run on this machine, in one process or in several that are one run.

    python launch/local.py -- --config tokenizer:tiny --workdir runs/one
    python launch/local.py --processes 4 -- --config tokenizer:tiny --workdir runs/four --config.mesh.data=4

One process holds all devices. Several share the GPUs evenly; without GPUs each has --devices-per-process
CPU devices. They are watched: when one fails, or ends while others do not, the others are told to end and
then killed, so that a process that is stuck never holds the rest. SIGTERM, SIGUSR1 and Ctrl-C reach every
process: it saves and ends with 75. A second Ctrl-C kills. Run it again and the run goes on.
"""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import flags

PREEMPTED = 75  # what a run ends with that was stopped from outside, after saving


def main(argv):
    parser = flags.parser(__doc__)
    parser.add_argument("--processes", type=flags.count(1), default=1)
    parser.add_argument(
        "--devices-per-process", type=flags.count(1), help="default: all GPUs, evenly; CPU: 1"
    )
    parser.add_argument("--grace", type=float, default=60, help="seconds to end in, before being killed")
    parser.add_argument("--retries", type=flags.count(0), default=0, help="times to start again by itself")
    parser.add_argument("--command", help="what to run instead of `mmgen train`, as 'mmgen tokenize'")
    args, training = flags.parse(parser, argv)
    ours = [sys.executable, "-m", "mmgen", "train"]
    command = [*(ours if args.command is None else shlex.split(args.command)), *training]
    if not command or not shutil.which(command[0]):
        parser.error(f"--command must begin with a program that can be found, not {args.command!r}")
    place = lambda port: [environment(rank, args, port) for rank in range(args.processes)]
    try:
        shown = place("PORT")
    except ValueError as error:
        parser.error(str(error))

    if args.dry_run:
        if args.processes > 1:
            print(f"# {args.processes} processes side by side; PORT is one that is free")
        for variables in shown:
            settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
            print(*settings, shlex.join(command))
        return 0
    if args.processes == 1 and not args.retries:  # nothing to watch: signals and the terminal are its own
        os.execvpe(command[0], command, os.environ | shown[0])
    for left in range(args.retries, -1, -1):
        commands = [(command, os.environ | variables) for variables in place(free_port())]
        status, stopped = supervise(commands, args.grace)
        if status == 0 or stopped or not left:
            return status
        say(f"starting again, from the last checkpoint; {left - 1} more times after this")


def environment(rank, args, port):
    """What the process `rank` finds in its environment, beside what is there already."""
    several, each, names, found = args.processes > 1, args.devices_per_process, gpus(), {}
    if several:
        found |= {
            "MMGEN_DISTRIBUTED": f"{rank}/{args.processes}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        }
        found["PYTHONUNBUFFERED"] = "1"  # lines come when they are written, and none is lost with its process
    if not names and (each or several):
        before = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        found["XLA_FLAGS"] = f"{before} --xla_force_host_platform_device_count={each or 1}".strip()
    if names and (each or several):
        if len(names) < args.processes * (each or 1) or (not each and len(names) % args.processes):
            raise ValueError(
                f"{args.processes} processes with {each or 'equally many'} GPUs each; found {len(names)}; "
                "change --processes or --devices-per-process, or set JAX_PLATFORMS=cpu"
            )
        each = each or len(names) // args.processes
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names[rank * each : (rank + 1) * each])
        # Within a SLURM allocation JAX would take the first of them alone.
        found["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(each)))
    return found


def gpus():
    """The names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES writes them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return sorted((p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*")), key=int)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def supervise(commands, grace):
    """Runs [(command, environment)] side by side -> (status, whether a signal to us ended them).

    The status is that of the first process that did not end with 0 (128 + n for signal n). All have ended,
    with whatever they started, at most twice `grace` seconds after the first of them.
    """
    received = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    running, readers, answered, status = {}, [], 0, 0
    orders, due = [signal.SIGTERM, signal.SIGKILL], math.inf
    try:
        for rank, (command, variables) in enumerate(commands):
            running[rank] = subprocess.Popen(
                command, env=variables,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers are one group with it, and Ctrl-C is ours to pass on
            )  # fmt: skip
            readers.append(threading.Thread(target=copy, args=(rank, running[rank].stdout), daemon=True))
            readers[-1].start()
        while running:
            for rank, process in list(running.items()):
                if not ended(process):
                    continue
                kill(process)  # what it left behind; before reaping, while the group is surely its own
                code = process.wait()
                code = 128 - code if code < 0 else code
                say(f"process {rank} ended with status {code}")
                del running[rank]
                status = status or code
                if signal.SIGTERM in orders:  # after a failure the others wait for a process that is gone
                    due = min(due, time.monotonic() + (grace if code in (0, PREEMPTED) else 0))
            for number in received[answered:]:
                answered += 1
                if received[:answered].count(signal.SIGINT) > 1:
                    orders, due = [signal.SIGKILL], time.monotonic()
                for process in running.values():  # not their workers, whose data saving may still need
                    process.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
            if running and orders and time.monotonic() >= due:
                order = orders.pop(0)
                say(f"{order.name} to {', '.join(f'process {rank}' for rank in running)}")
                for process in running.values():
                    kill(process) if order == signal.SIGKILL else process.send_signal(order)
                due = time.monotonic() + grace
            time.sleep(0.05)
    finally:
        for process in running.values():
            kill(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join(1)
    return status, bool(received)


def ended(process):
    """Whether it has ended; it remains to be reaped."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(process):
    """Kills the whole group, stopped processes too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def copy(rank, stream):
    """Copies the lines of a process to our output, marked as its own."""
    for line in stream:
        with contextlib.suppress(OSError):  # nobody reads us any more: the process shall not wait for it
            sys.stdout.buffer.write(f"[{rank}] ".encode() + line)
            sys.stdout.buffer.flush()


def say(text):
    print(f"[launch] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
