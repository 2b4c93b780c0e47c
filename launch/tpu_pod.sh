#!/usr/bin/env bash
# A run over all hosts of a TPU slice, from your own machine with gcloud:
#
#   NAME=my-slice ZONE=us-east5-a launch/tpu_pod.sh --config transformer:350m --workdir /mnt/runs/350m \
#       --config.data.shards=/mnt/shards
#
# Every host needs this checkout in ~/mmgen, and a file system that all of them see for the workdir and
# the shards. JAX asks the slice who is who. Run it again to resume.
# NOT RUN ON A POD YET: written from the documentation of JAX and Cloud TPU.
set -euo pipefail
: "${NAME:?the name of the TPU}" "${ZONE:?its zone}"
printf -v flags '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  cd ~/mmgen
  python3 -m venv .venv
  .venv/bin/pip install -q -e '.[tpu]'
  MMGEN_DISTRIBUTED=auto .venv/bin/mmgen train $flags"
