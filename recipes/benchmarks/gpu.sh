#!/usr/bin/env bash
# Everything worth knowing of a machine with a GPU, within so many minutes and in order of worth. Each step has its share of the time,
# and one that fails or runs out of it does not stop the next.
#
#     recipes/benchmarks/gpu.sh MINUTES MODEL DATA OUT [--dry]
#
# MODEL is the folder of a pretrained DeiT-Tiny with its image processor (22 MiB), DATA one with train.parquet and test.parquet of
# columns image and label (50 classes of Caltech-101 take 25 MiB): with this repository they fit in 64 MiB. OUT gets records and logs.
# Needed beside them: an environment with this package and its extra `test`. --dry tries each step on little data, on a CPU too.
#
# 1. The tests that need a GPU: cached against live, in fp32 and bf16.
# 2. Images per second of cached, limit, frozen and full training: DeiT-Tiny with its weights, DeiT-Base shapes with random ones.
# 3. What an evaluation takes from a cache.
# 4. Accuracy over time: schedule="auto", full fine-tuning and LoRA.
set -uo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 MINUTES MODEL DATA OUT [--dry]" >&2
  exit 2
fi
minutes=$1 model=$2 data=$3 out=$4 dry=${5:-}
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
points="${SPLIT_POINTS:-6,9,11}"
last="${points##*,}"
total=$(awk "BEGIN {print int($minutes * 60)}")
failed=0
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() {  # step NAME SHARE COMMAND...
  local name=$1 seconds started=$SECONDS status=0
  seconds=$(awk "BEGIN {print int($total * $2 / 100)}")
  shift 2
  echo "== $name: at most $seconds s"
  timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n 4 "$out/$name.log"
  echo "== $name: status $status after $((SECONDS - started)) s"
  [ "$status" -eq 0 ] || failed=$((failed + 1))
}

if [ "$dry" = "--dry" ]; then
  little=(--images 32 --rounds 1 --steps 1 --batch-size 8 --no-memory)
  evaluating=(--images 16 --rounds 1 --batch-size 8)
  base=(--model "$model")
  accuracy=(--smoke)
else
  little=(--images 2048 --rounds 5 --steps 16 --batch-size 128 --workers 8)
  evaluating=(--images 1024 --rounds 3 --batch-size 128 --bf16)
  base=(--shape deit-base)
  accuracy=(
    --model "$model" --data "$data" --bf16 --workers 8 --phase tune test table clock
    --arms auto/epochs=4/budget=0.33/decay=0.75 full/epochs=1/decay=0.75 full/epochs=4/decay=0.75 lora/epochs=4
    --budget "$((total * 25 / 100))"
  )
fi
step tests 15 "$python" -m pytest "$here/../../tests" -m gpu -q -p no:cacheprovider
step tiny 20 "$python" "$here/epoch_cost.py" --model "$model" --data "$data" --split-points "$points" \
  --json "$out/epoch_cost--tiny.json" "${little[@]}"
step base 25 "$python" "$here/epoch_cost.py" "${base[@]}" --data "$data" --split-points "$points" \
  --json "$out/epoch_cost--base.json" "${little[@]}"
step evaluating 10 "$python" "$here/evaluating.py" --model "$model" --data "$data" --split-points "$last" \
  --json "$out/evaluating.json" "${evaluating[@]}"
step accuracy 30 "$python" "$here/time_to_accuracy.py" "${accuracy[@]}" --json "$out/time_to_accuracy.json"
echo "records in $out; $failed of 5 steps failed"
exit $((failed > 0))
