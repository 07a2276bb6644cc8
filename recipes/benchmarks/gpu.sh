#!/usr/bin/env bash
# Everything worth knowing of a machine with a GPU, within so many minutes and in order of worth. Each step has its share of the time
# that is left, and one that fails or runs out of it does not stop the next; what it had reached by then is in its record.
#
#     recipes/benchmarks/gpu.sh MINUTES MODEL DATA OUT [--dry]
#
# MODEL is the folder of a pretrained DeiT-Tiny with its image processor (22 MiB), DATA one with train.parquet and test.parquet of
# columns image and label (50 classes of Caltech-101 take 25 MiB): with this repository they fit in 64 MiB. Models of other shapes have
# random weights, and caches that are only read hold made-up states. OUT gets records and logs. Needed beside them: an environment
# with this package and its extra `test`; without PEFT, which is in it, device.py leaves LoRA out. --dry tries each step on little
# data, on a CPU too.
#
# 1. The tests that need a GPU: cached against live, in fp32 and bf16.
# 2. Full, LoRA, frozen, cached and limit in images per second, synchronisations of the host, and where the time goes: DeiT-Tiny with its
#    weights, DeiT-Base and ViT-Large shapes with random ones.
# 3. How fast caches are read, by threads and width.
# 4. What an evaluation takes from a cache.
# 5. Accuracy over time, of 30 epochs and three seeds: schedule="auto", a schedule, full fine-tuning and LoRA.
set -uo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 MINUTES MODEL DATA OUT [--dry]" >&2
  exit 2
fi
minutes=$1 model=$2 data=$3 out=$4 dry=${5:-}
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
last="${SPLIT_POINT:-11}"
end=$((SECONDS + $(awk "BEGIN {print int($minutes * 60)}")))
shares=100  # of the steps that are left
failed=0 steps=0
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

limit() {  # limit SHARE: seconds of a step with that share, less those that it may take to die
  echo $(((end - SECONDS) * $1 / shares - 2))
}

step() {  # step NAME SHARE COMMAND...
  local name=$1 share=$2 seconds started=$SECONDS status=0
  seconds=$(limit "$share")
  shares=$((shares - share)) steps=$((steps + 1))
  shift 2
  if [ "$seconds" -lt 1 ]; then
    echo "== $name: status 124, no time is left"
    failed=$((failed + 1))
    return
  fi
  echo "== $name: at most $seconds s"
  timeout --kill-after=1 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n 4 "$out/$name.log"
  echo "== $name: status $status after $((SECONDS - started)) s"
  [ "$status" -eq 0 ] || failed=$((failed + 1))
}

if [ "$dry" = "--dry" ]; then
  device=(--shapes mini --splits 0.75 --images 16 --rounds 1 --steps 1 --batch-size 4 --codec lossless)
  reading=(--hidden 16 --tokens 5 --megabytes 1 --batch-size 16 --threads 0 2 --epochs 1 --rounds 1 --no-lossless)
  evaluating=(--images 16 --rounds 1 --batch-size 8)
  accuracy=(--smoke --smoke-arms ours/k=2/epochs=1)
else
  device=(--model "$model" --shapes deit-base vit-large --splits 0.75 0.92 0.5 --images 1024 --rounds 3 --workers 8)
  reading=(--hidden 192 768 1024 --threads 0 1 2 4 8 --megabytes 300 --rounds 3 --no-lossless)
  evaluating=(--images 1024 --rounds 3 --batch-size 128 --bf16)
  accuracy=(
    --model "$model" --data "$data" --bf16 --workers 8 --seeds 1 2 3
    --arms auto/epochs=30/budget=0.25/decay=0.75 full/epochs=30/decay=0.75 ours/k=9/epochs=30/views=4/keep=0.5/decay=0.75
    lora/epochs=30
  )
fi
step tests 10 "$python" -m pytest "$here/../../tests/training/test_gpu.py" -m gpu -q -p no:cacheprovider
step device 40 "$python" "$here/device.py" --data "$data" --json "$out/device.json" \
  --seconds "$(($(limit 40) * 9 / 10))" "${device[@]}"
step reading 8 "$python" "$here/reading.py" --json "$out/reading.json" "${reading[@]}"
step evaluating 7 "$python" "$here/evaluating.py" --model "$model" --data "$data" --split-points "$last" \
  --json "$out/evaluating.json" "${evaluating[@]}"
# Each run is tuned and tested first. What is left of the time is for the clock: each once more, by itself, in the same record.
step accuracy 35 "$python" "$here/time_to_accuracy.py" "${accuracy[@]}" --phase tune test clock table \
  --budget "$(($(limit 35) * 6 / 10))" --json "$out/time_to_accuracy.json"
echo "records in $out; $failed of $steps steps failed"
exit $((failed > 0))
