#!/usr/bin/env bash
# Transformers of several sizes on the same documents, for a fitted line (docs/reference.md#scaling): like the released one,
# on 64 px pictures alone, at a constant rate, their averaged weights measured on held-out documents every hundred steps. An
# hour and a half of one CPU core.
#
#   launch/scaling.sh runs/scaling && python benchmarks/scaling.py runs/scaling/*/config.json
#
# Run it again and it goes on where it was; `launch/scaling.sh runs/try 200 2` learns nothing (a divisor of documents, steps).
set -euo pipefail
dir=${1:?usage: launch/scaling.sh FOLDER [DIVISOR [STEPS]]}
divisor=${2:-1} steps=${3:-}
from=$(python -c 'import mmgen, pathlib; print(pathlib.Path(mmgen.__file__).parent / "reference")')
tasks="
plain / 1142
draw /draw 2284
refusal /refusal 856
edit /edit 4284
style /style 1284
ask /question 2000
caption /caption 2000
detail /detail 1714
compare /compare 570
reason /reason 514
dialogue /dialogue 1000
sign /sign 2856
"

shards() {  # split, seed, tenths of the documents, at least two
  made=
  while read -r name task count; do
    [ -n "$name" ] || continue
    count=$((count * $3 / 10 / divisor))
    mmgen tokenize --source "$name=world:$1${task%/}" --size 64x64 --documents $((count > 2 ? count : 2)) --seed "$2" \
      --languages en,zh --tokenizer "$from/tokenizer" --text "$from/text.model" --max-side 16 --longest 640 --overlong cut \
      --out "$dir/shards/$1/$name"
    made=$made,$dir/shards/$1/$name
  done <<< "$tasks"
}
shards valid 21 1
held_out=${made#,}
shards train 20 10

size() {  # name, width, layers, heads, hidden units, of outlines, steps
  mmgen train --config transformer:reference --workdir "$dir/$1" --config.data.shards="${made#,}" \
    --config.held_out.shards="$held_out" --config.held_out.batches=6 --config.evaluate_every=100 \
    --config.data.mixture="(('plain',.08),('draw',.1),('refusal',.03),('edit',.27),('style',.07),('ask',.06),('caption',.06),('detail',.05),('compare',.02),('reason',.02),('dialogue',.08),('sign',.12))" \
    --config.model.width="$2" --config.model.layers="$3" --config.model.heads="$4" --config.model.kv_heads="$4" \
    --config.model.head_dim=32 --config.model.mlp="$5" --config.model.outline="$6" --config.steps="${steps:-$7}" \
    --config.model.dtype=float32 --config.model.unroll=true --config.keep_pages=true --config.data.batch_size=8 --config.data.row_length=640 \
    --config.ema=0.99 --config.optimizer.warmup=50 --config.optimizer.final=1.0 --config.save_every=200 \
    --config.optimizer.learning_rate=1.5e-2 --config.optimizer.adam_learning_rate=4e-3
}
size xs 64 2 2 176 48 1200
size s 96 3 3 256 64 1200
size m 160 5 5 448 128 900
