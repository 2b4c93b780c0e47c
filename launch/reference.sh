#!/usr/bin/env bash
# The model that comes with mmgen, from nothing (docs/reference.md): the tokenizer and the shards on two CPU cores in an
# hour and a half, the transformer, its rewards and the towers in half an hour of an H100, the refiner and what it says of pictures in an hour of CPU cores. The released one was made in
# pieces, and differs: reinforce:reading went on from what was packed in 8 bits before, and was added 1.5 times; until the rewards its text model told quoted words in pieces, not in letters, and its first part
# had fewer signs and posters; the set of reference-5 had more signs, fewer edits and no marked images; its towers saw
# scenes first and all kinds after. The image classifier beside it is another road (docs/safety.md).
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

# name, task (of mmgen/world/tasks.py), picture size, documents before the rewards and after them, more flags: shares of
# tokens are the config's data.mixture
tasks="
plain world:train 64x64 34000 8000
draw world:train/draw 64x64 22000 16000
refusal world:train/refusal 64x64 13000 6000
edit world:train/edit 64x64 36000 30000 --marked=0.2
style world:train/style 64x64 6800 9000 --marked=0.2
ask world:train/question 64x64 13000 14000 --marked=0.1
caption world:train/caption 64x64 11000 14000 --marked=0.1
detail world:train/detail 64x64 12500 12000 --marked=0.1
compare world:train/compare 64x64 2800 4000 --marked=0.1
mix world:train/mix 64x64 1500 2500
reason world:train/reason 64x64 3600 3600
dialogue world:train/dialogue 64x64 6600 7000
story world:train/story 64x64 500 500
prose world:train/prose 64x64 5000 1500
sign world:train/sign 64x64 20000 40000
poster world:train/poster 128x128 3300 4500
chart world:train/chart 128x128 3200 3200
diagram world:train/diagram 128x128 2600 2600
comic world:train/comic 128x128 3000 3000
count world:train 64x64 0 8000 --category=counting
"

if [ ! -e "$dir/text.model" ]; then
  sources=()
  while read -r name spec _; do
    [ -z "$name" ] || [ "$name" = count ] || sources+=(--source "$name=$spec")
  done <<< "$tasks"
  mmgen text "${sources[@]}" --documents "${documents:-1500}" --size 128x128 --languages en,zh --pieces 1500 --out "$dir/text.model"
fi
mmgen train --config tokenizer:reference --workdir "$dir/tokenizer" $steps

# Documents of another seed for each part: seed, tenths of the table's first numbers or, with "later", of its second, and
# a source to leave out
tokenize() {
  made=
  while read -r name spec size first later flags; do
    [ -n "$name" ] && [ "$name" != "${4:-}" ] || continue
    count=$first
    if [ -n "${3:-}" ]; then count=$later; else flags=; fi
    [ "$count" -gt 0 ] || continue
    mmgen tokenize --source "$name=$spec" --size "$size" --documents "${documents:-$((count * $2 / 10))}" --seed "$1" \
      --languages en,zh --tokenizer "$dir/tokenizer" --text "$dir/text.model" --max-side 32 --longest 1280 --overlong cut \
      --max-bad 0.5 $flags --out "$dir/shards-$1/$name"
    made=$made,$dir/shards-$1/$name
  done <<< "$tasks"
}
part() {  # preset, the run it goes on from
  mmgen train --config "$1" --workdir "$dir/${1#*:}" --config.data.shards="${made#,}" ${2:+--config.init="$dir/$2"} $steps $small
}
tokenize 0 10
part transformer:reference
part transformer:reference-2 reference
tokenize 7 8
part transformer:reference-3 reference-2
tokenize 8 10
part transformer:reference-4 reference-3
mmgen train --config reinforce:reference --workdir "$dir/rewards" --config.init="$dir/reference-4" $steps ${3:+$tiny}
tokenize 11 10 later count
part transformer:reference-5 rewards
before=$made
tokenize 12 10 later
made=$before$made
part transformer:reference-6 reference-5
mmgen train --config contrastive:reference --workdir "$dir/reference-6/towers" --config.data.text="$dir/text.model" $steps \
  ${3:+--config.data.batch_size=16 --config.held_out.documents=50}
mmgen train --config refiner:reference --workdir "$dir/reference-6/refiners/x2" --config.data.tokenizer="$dir/tokenizer" $steps
mmgen train --config reinforce:reading --workdir "$dir/reading" --config.init="$dir/reference-6" $steps ${3:+$tiny}
[ -e "$dir/packed" ] || mmgen tools pack --checkpoint "$dir/reference-6" --add "$dir/reading" --out "$dir/packed"
