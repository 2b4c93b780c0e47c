#!/usr/bin/env bash
# The model that comes with mmgen, from nothing (docs/reference.md): the tokenizer and the shards on two CPU cores in an
# hour, the transformer in five minutes of an H100.
#
#   launch/reference.sh runs/reference         # the model of docs/reference.md
#   launch/reference.sh runs/try 60 20         # learns nothing: documents a task, and steps
#
# Run it again and it goes on where it was.
set -euo pipefail
dir=${1:?usage: launch/reference.sh FOLDER [DOCUMENTS [STEPS]]}
documents=${2:-}
steps=${3:+--config.steps=$3}
small=${3:+--config.data.batch_size=2}  # a batch of the transformer takes more memory than most machines without a GPU have
mkdir -p "$dir"

# name, task (of mmgen/world/tasks.py), picture size, documents: shares of tokens are the config's data.mixture
tasks="
plain world:train 64x64 34000
draw world:train/draw 64x64 22000
refusal world:train/refusal 64x64 13000
edit world:train/edit 64x64 36000
style world:train/style 64x64 6800
ask world:train/question 64x64 13000
caption world:train/caption 64x64 11000
detail world:train/detail 64x64 12500
compare world:train/compare 64x64 2800
mix world:train/mix 64x64 1500
reason world:train/reason 64x64 3600
dialogue world:train/dialogue 64x64 6600
story world:train/story 64x64 500
prose world:train/prose 64x64 5000
sign world:train/sign 64x64 14000
poster world:train/poster 128x128 2200
chart world:train/chart 128x128 3200
diagram world:train/diagram 128x128 2600
comic world:train/comic 128x128 3000
"

if [ ! -e "$dir/text.model" ]; then
  sources=()
  while read -r name spec _; do
    [ -z "$name" ] || sources+=(--source "$name=$spec")
  done <<< "$tasks"
  mmgen text "${sources[@]}" --documents "${documents:-1500}" --size 128x128 --languages en,zh --pieces 1500 --out "$dir/text.model"
fi
mmgen train --config tokenizer:reference --workdir "$dir/tokenizer" $steps
shards=
while read -r name spec size count; do
  [ -n "$name" ] || continue
  mmgen tokenize --source "$name=$spec" --size "$size" --documents "${documents:-$count}" --languages en,zh \
    --tokenizer "$dir/tokenizer" --text "$dir/text.model" --max-side 32 --longest 1280 --overlong cut --max-bad 0.5 \
    --out "$dir/shards/$name"
  shards=$shards,$dir/shards/$name
done <<< "$tasks"
mmgen train --config transformer:reference --workdir "$dir/transformer" --config.data.shards="${shards#,}" $steps $small
mmgen train --config transformer:reference-2 --workdir "$dir/transformer-2" --config.data.shards="${shards#,}" \
  --config.init="$dir/transformer" $steps $small
