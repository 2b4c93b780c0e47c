#!/usr/bin/env bash
# The model that comes with mmgen, from nothing (docs/reference.md): the tokenizer and the shards on two CPU cores in an
# hour, the transformer and its rewards in sixteen minutes of an H100. The released one was made in pieces, and differs in
# two things: its text model tells quoted words in pieces, not in letters, and its first part had fewer signs and posters.
#
#   launch/reference.sh runs/reference         # the model of docs/reference.md
#   launch/reference.sh runs/try 60 20         # learns nothing: documents a task, and steps
#
# Run it again and it goes on where it was.
set -euo pipefail
dir=${1:?usage: launch/reference.sh FOLDER [DOCUMENTS [STEPS]]}
documents=${2:-}
steps=${3:+--config.steps=$3}
# A batch of the transformer takes more memory than most machines without a GPU have, and pictures more time
small=${3:+--config.data.batch_size=2}
tiny="--config.data.batch_size=8 --config.data.workers=1 --config.accumulate=1 --config.held_out.prompts=0"
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
sign world:train/sign 64x64 20000
poster world:train/poster 128x128 3300
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

# Documents of another seed for each part: share of the table above, seed -> $shards
tokenize() {
  shards=
  while read -r name spec size count; do
    [ -n "$name" ] || continue
    mmgen tokenize --source "$name=$spec" --size "$size" --documents "${documents:-$((count * $1 / 10))}" --seed "$2" \
      --languages en,zh --tokenizer "$dir/tokenizer" --text "$dir/text.model" --max-side 32 --longest 1280 --overlong cut \
      --max-bad 0.5 --out "$dir/shards-$2/$name"
    shards=$shards,$dir/shards-$2/$name
  done <<< "$tasks"
  shards=${shards#,}
}
part() {  # preset, the run it goes on from
  mmgen train --config "$1" --workdir "$dir/${1#*:}" --config.data.shards="$shards" ${2:+--config.init="$dir/$2"} $steps $small
}
tokenize 10 0
part transformer:reference
part transformer:reference-2 reference
tokenize 8 7
part transformer:reference-3 reference-2
tokenize 10 8
part transformer:reference-4 reference-3
mmgen train --config reinforce:reference --workdir "$dir/rewards" --config.init="$dir/reference-4" $steps ${3:+$tiny}
