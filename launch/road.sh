#!/usr/bin/env bash
# The whole road on this machine, stage by stage, with the devices that JAX finds.
#
#   launch/road.sh runs/first              # quickstart sizes
#   launch/road.sh runs/tiny tiny 300      # seconds: VARIANT and number of documents
#
# Run it again and it goes on where it was. Tried: on two CPU cores. On GPUs or TPUs install the extra
# first (pip install -e '.[gpu]'); several devices of one machine need nothing more.
set -euo pipefail
dir=${1:?usage: launch/road.sh FOLDER [VARIANT [DOCUMENTS]]}
variant=${2:-quickstart}
documents=${3:-90000}
world=(--source world:train --documents "$documents")
mkdir -p "$dir"

[ -e "$dir/text.model" ] || mmgen text "${world[@]}" --pieces 384 --out "$dir/text.model"
mmgen train --config "tokenizer:$variant" --workdir "$dir/tokenizer"
mmgen tokenize "${world[@]}" --tokenizer "$dir/tokenizer" \
  --text "$dir/text.model" --max-side 16 --out "$dir/shards"
mmgen train --config "transformer:$variant" --workdir "$dir/transformer" --config.data.shards="$dir/shards"
mmgen sample --checkpoint "$dir/transformer" --prompt "a large red circle above a small blue star" \
  --n 4 --seed 0 --scale 4 --out "$dir/sample.png"
