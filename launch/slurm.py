"""A run over the nodes of a SLURM cluster: writes the batch script and gives it to sbatch.

    python launch/slurm.py --nodes 2 --gpus-per-node 8 --time 24:00:00 -- \\
        --config transformer:350m --workdir /shared/runs/350m --config.data.shards=/shared/shards

Submit it where the venv and relative paths hold; the workdir and the shards must be on a file system that all
nodes see. Before its time is up, or where it is preempted, the run saves and goes back into the queue. A
failure starts it again --retries times within the allocation. Submitted again, it waits for the job of the
same name to end and goes on from there.
"""

import os
import shlex
import subprocess
import sys

import flags

# The signal comes to this shell alone (B:); srun passes it on to the tasks, which save and end with 75. The
# first task to end may have the others killed, so that srun says 137: once the signal came, any failure means
# "again".
# SIGTERM (scancel) is not caught: it ends the shell, and nothing is requeued.
SCRIPT = """\
set -uo pipefail
source {activate} || exit 1
export MMGEN_DISTRIBUTED=auto PYTHONUNBUFFERED=1{devices}
command=(srun --kill-on-bad-exit=1 --wait={grace} --label{cpus}
  {command})
signals=0
trap 'signals=$((signals + 1)); [[ -z ${{step-}} ]] || kill -USR1 "$step"' USR1
for ((left = {retries}; ; left--)); do
  "${{command[@]}}" &
  step=$!
  # A signal interrupts `wait`: wait again, until srun itself has ended.
  while before=$signals; wait "$step"; status=$?; ((signals != before)); do :; done
  ((status != 0)) || exit 0
  if ((status == 75 || signals > 0)); then
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
  fi
  ((left > 0)) || exit "$status"
  echo "launch: status $status; starting again from the last checkpoint, $((left - 1)) more times after this"
done
"""


def main(argv):
    parser = flags.parser(__doc__)
    parser.add_argument("--nodes", type=flags.count(1), default=1)
    parser.add_argument("--gpus-per-node", type=flags.count(0), default=8, help="0: train on CPU")
    parser.add_argument("--cpus-per-node", type=flags.count(1), default=32)
    parser.add_argument("--time", type=flags.word, default="24:00:00")
    parser.add_argument("--partition", type=flags.word)
    parser.add_argument("--account", type=flags.word)
    parser.add_argument("--name", type=flags.word, help="default: from the workdir")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument(
        "--signal", type=flags.count(60), default=300, help="seconds for saving before the end"
    )
    parser.add_argument("--grace", type=flags.count(1), default=120, help="seconds from the first task's end")
    parser.add_argument("--retries", type=flags.count(0), default=3, help="times to start again by itself")
    args, training = flags.parse(parser, argv)

    settings = {
        "job-name": args.name or flags.name_of(os.path.abspath(flags.value(training, "--workdir"))),
        "dependency": "singleton",  # one job of a name at a time: two would write the same workdir
        "nodes": args.nodes,
        "ntasks-per-node": 1,  # one process a node, which holds all GPUs of its node
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus_per_node,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
        "signal": f"B:USR1@{args.signal}",
    }
    header = [f"#SBATCH --{name}={v}".removesuffix("=") for name, v in settings.items() if v is not None]
    # Left alone, JAX gives a SLURM task one GPU: the one of its number in the node.
    devices = (
        " JAX_LOCAL_DEVICE_IDS=" + ",".join(map(str, range(args.gpus_per_node))) if args.gpus_per_node else ""
    )
    body = SCRIPT.format(
        activate=shlex.quote(f"{args.venv}/bin/activate"),
        devices=devices,
        cpus=f" --cpus-per-task={args.cpus_per_node}",  # srun takes it over from sbatch in some versions only
        grace=args.grace,
        command=shlex.join(["mmgen", "train", *training]),
        retries=args.retries,
    )
    script = "\n".join(["#!/bin/bash", *header, body])
    if args.dry_run:
        print(script, end="")
        return 0
    return subprocess.run(["sbatch"], input=script, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
