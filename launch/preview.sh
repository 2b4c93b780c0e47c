#!/usr/bin/env bash
# The preview model: one transformer for all that the world asks, from nothing, on two CPU cores (docs/preview.md).
#
#   launch/preview.sh runs/preview           # the model of docs/preview.md: hours
#   launch/preview.sh runs/try 60 20         # minutes, learns nothing: documents a task, and steps
#
# Run it again and it goes on where it was.
set -euo pipefail
dir=${1:?usage: launch/preview.sh FOLDER [DOCUMENTS [STEPS]]}
documents=${2:-}
steps=${3:+--config.steps=$3}
cases=${2:+--seen 2 --unseen 1 --probe 2}
mkdir -p "$dir"

# name, task (of mmgen/world/tasks.py), picture size, documents: shares of tokens are the config's data.mixture
tasks="
plain world:train 64x64 150000
draw world:train/draw 64x64 60000
refusal world:train/refusal 64x64 20000
edit world:train/edit 64x64 120000
style world:train/style 64x64 30000
ask world:train/question 64x64 60000
caption world:train/caption 64x64 40000
detail world:train/detail 64x64 40000
compare world:train/compare 64x64 10000
mix world:train/mix 64x64 8000
reason world:train/reason 64x64 12000
dialogue world:train/dialogue 64x64 12000
story world:train/story 64x64 4000
prose world:train/prose 64x64 4000
sign world:train/sign 64x64 25000
page world:train/poster+chart+diagram+comic 128x128 12000
"

if [ ! -e "$dir/text.model" ]; then
  sources=()
  while read -r name spec _; do
    [ -z "$name" ] || sources+=(--source "$name=$spec")
  done <<< "$tasks"
  mmgen text "${sources[@]}" --documents "${documents:-1500}" --size 128x128 --languages en,zh --pieces 1200 --out "$dir/text.model"
fi
mmgen train --config tokenizer:world --workdir "$dir/tokenizer" $steps
shards=
while read -r name spec size count; do
  [ -n "$name" ] || continue
  mmgen tokenize --source "$name=$spec" --size "$size" --documents "${documents:-$count}" --tokenizer "$dir/tokenizer" \
    --text "$dir/text.model" --max-side 16 --longest 640 --out "$dir/shards/$name"
  shards=$shards,$dir/shards/$name
done <<< "$tasks"
init=
for part in preview preview-2 preview-3; do
  mmgen train --config "transformer:$part" --workdir "$dir/$part" --config.data.shards="${shards#,}" $init $steps
  init=--config.init=$dir/$part
done
mmgen train --config reinforce:preview --workdir "$dir/reinforce" "$init" $steps
mmgen evaluate --checkpoint "$dir/reinforce" --suite all --size 64x64 \
  --out "$dir/report" $cases
