#!/usr/bin/env bash
# Several processes of one run on one machine: what a cluster does, small enough to debug.
#
#   launch/multiprocess.sh 2 --config tokenizer:tiny --workdir runs/two
#
# Each process holds the devices that its backend gives it, and the mesh spans them all. To split GPUs,
# set CUDA_VISIBLE_DEVICES for each. Needs a free port, PORT.
#
# Tried: two CPU processes training tokenizer:tiny, whose losses equal those of one process. Not tried:
# GPUs, and killing one process of several. The first process alone writes the workdir's metrics.
set -euo pipefail
count=${1:?usage: launch/multiprocess.sh PROCESSES --config NAME:VARIANT --workdir DIR [...]}
shift
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((rank = 0; rank < count; rank++)); do
  MMGEN_DISTRIBUTED=$rank/$count python -m mmgen train "$@" > >(sed "s|^|[$rank] |") 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done  # the first that fails ends the script, and the trap the rest
