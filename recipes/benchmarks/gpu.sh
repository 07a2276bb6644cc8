#!/usr/bin/env bash
# Everything worth knowing of a machine with a GPU, within so many minutes and in order of worth. Each step has its share of the time
# that is left, and one that fails or runs out of it does not stop the next; what it had reached by then is in its record.
#
#     recipes/benchmarks/gpu.sh MINUTES MODEL DATA OUT [--dry]
#
# MODEL is the folder of a pretrained DeiT-Tiny with its image processor (22 MiB), DATA one with train.parquet and test.parquet of
# columns image and label (50 classes of Caltech-101 take 15 and 21 MiB). With this repository (6 MiB) they come to 64 MiB; where no more
# may travel, every third test row does:
#
#     python -c "import datasets; datasets.Dataset.from_parquet('test.parquet').shard(3, 0).to_parquet('DATA/test.parquet')"
#
# Models of other shapes have random weights, and caches that are only read hold made-up states. OUT gets records and logs, and all of them
# once more in records.tar.gz. Needed beside them: an environment with this package's dependencies and its extra `test`, the package itself
# installed or on PYTHONPATH; without PEFT, which is in it, device.py leaves LoRA out. --dry tries each step on little data, on a CPU too.
#
# 1. The tests that need a GPU: cached against live, in fp32, bf16 and fp16.
# 2. Full, LoRA, frozen, cached and limit in images per second, synchronisations of the host, and where the time goes: DeiT-Tiny with its
#    weights, DeiT-Base and ViT-Large shapes with random ones.
# 3. How fast caches are read, by threads and width.
# 4. What an evaluation takes from a cache.
# 5. The clock of schedule="auto", full fine-tuning and LoRA, each by itself, at the learning rates that the record of Caltech-101 has chosen.
# 6. Their accuracy, seed by seed.
set -uo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 MINUTES MODEL DATA OUT [--dry]" >&2
  exit 2
fi
minutes=$1 model=$2 data=$3 out=$4 dry=${5:-}
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$(command -v python || command -v python3 || echo python)}"
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
  device=(--shapes mini --splits 0.75 --images 64 --rounds 1 --steps 1 --batch-size 4 --codec lossless)
  reading=(--hidden 16 --tokens 5 --megabytes 1 --batch-size 16 --threads 0 2 --epochs 1 --rounds 1 --no-lossless)
  evaluating=(--images 16 --rounds 1 --batch-size 8)
  accuracy=(--smoke --smoke-arms ours/k=2/epochs=1) clock=(tune clock) seeds=(tune test table)
else
  device=(--model "$model" --shapes deit-base vit-large --splits 0.75 0.92 0.5 --images 2048 --rounds 3 --workers 8)
  reading=(--hidden 192 768 1024 --threads 0 1 2 4 8 --megabytes 300 --rounds 3 --no-lossless)
  evaluating=(--images 1024 --rounds 3 --batch-size 128 --bf16)
  accuracy=(
    --model "$model" --data "$data" --image-size 112 --bf16 --workers 8 --seeds 1 2 3
    --rates "$here/results/time_to_accuracy--deit-tiny--caltech50-112.json"
    --arms auto/epochs=1/budget=1 full/epochs=8/decay=0.75 lora/epochs=8 auto/epochs=4 full/epochs=2/decay=0.75
  )
  clock=(clock) seeds=(test table)
fi
step tests 10 "$python" -m pytest "$here/../../tests/training/test_gpu.py" -m gpu -q -p no:cacheprovider \
  -o filterwarnings=default
step device 40 "$python" "$here/device.py" --data "$data" --json "$out/device.json" \
  --seconds "$(($(limit 40) * 9 / 10))" "${device[@]}"
step reading 8 "$python" "$here/reading.py" --json "$out/reading.json" "${reading[@]}"
step evaluating 7 "$python" "$here/evaluating.py" --model "$model" --data "$data" --split-points "$last" \
  --json "$out/evaluating.json" "${evaluating[@]}"
# No run begins that would hardly end.
step clock 20 "$python" "$here/time_to_accuracy.py" "${accuracy[@]}" --phase "${clock[@]}" \
  --budget "$(($(limit 20) * 8 / 10))" --json "$out/time_to_accuracy.json"
step accuracy 15 "$python" "$here/time_to_accuracy.py" "${accuracy[@]}" --phase "${seeds[@]}" \
  --budget "$(($(limit 15) * 8 / 10))" --json "$out/time_to_accuracy.json"
tar -czf "$out/records.tar.gz" -C "$out" --exclude=records.tar.gz --exclude='*-caches' . 2>/dev/null
echo "records in $out; $failed of $steps steps failed"
exit $((failed > 0))
