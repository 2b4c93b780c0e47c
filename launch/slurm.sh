#!/usr/bin/env bash
#SBATCH --job-name=mmgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # one process a node, which holds all GPUs of its node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue                 # the same command resumes
#SBATCH --output=%x-%j.log
#
# A run over the nodes of a SLURM job:
#
#   sbatch launch/slurm.sh --config transformer:350m --workdir /shared/runs/350m --config.data.shards=/shared/shards
#
# The workdir and the shards must be on a file system that all nodes see. JAX asks SLURM who is who.
# NOT RUN ON A CLUSTER YET: written from the documentation of JAX and SLURM.
set -euo pipefail
source "${VENV:-.venv}/bin/activate"
export MMGEN_DISTRIBUTED=auto
srun --kill-on-bad-exit=1 mmgen train "$@"
