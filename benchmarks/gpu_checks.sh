#!/bin/sh
# What docs/gpu-checks.md lists and one GPU can show in a few minutes, whatever becomes of the checks before:
#
#     sh benchmarks/gpu_checks.sh timings FOLDER    tests, then every timing; about ten minutes
#     sh benchmarks/gpu_checks.sh study FOLDER      the four runs of the gpu preset; about ten
#     sh benchmarks/gpu_checks.sh removal FOLDER    SmolLM2-135M without norms, and its control; about ten, resumes
#
# FOLDER gets a log of each check, the figures as JSON, and summary.txt: exit codes (124: out of time) and seconds.
# PYTHON says which Python has normfree installed, in any way; by default the one of .venv. The sources here are what is run.
set -u
part=${1:-} out=${2:-}
[ -n "$out" ] || { sed -n 's/^# *\(sh .*FOLDER\).*/usage: \1/p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"

# check NAME SECONDS ARGUMENTS: one run of Python, stopped after so many seconds.
check() {
  name=$1 seconds=$2
  shift 2
  start=$(date +%s)
  timeout "$seconds" "$python" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit code $?, $(($(date +%s) - start)) s" | tee -a "$out/summary.txt"
}

bench() {
  name=$1 seconds=$2
  shift 2
  check "$name" "$seconds" -m normfree bench "$@" --out "$out/$name.json"
}

case $part in
timings)
  check tests-kernels 150 -m pytest -q -p no:cacheprovider tests/entropy/test_triton.py tests/spark/decode/test_triton.py
  bench entropy-gpu 120 entropy
  bench spark_decode-model-bf16-gpu 90 sparse-decode model --dtype bf16
  bench spark_decode-ffn-bf16-gpu 45 sparse-decode ffn --dtype bf16
  bench train_throughput-gpu 90 training --preset gpu --peak-size 8192
  bench pipeline-gpu 120 pipeline packing evaluation checkpoint depth interpret --preset gpu
  bench step_cost-spark-gpu 120 step-cost spark --compile --layers 12 --heads 12 --tokens 1024
  bench step_cost-norms-gpu 120 step-cost norms --compile
  bench norm_free_inference-gpu 60 norm-free-inference
  check tests-entropy 120 -m pytest -q -p no:cacheprovider tests/entropy tests/probes
  ;;
study)
  check study-gpu 590 -m normfree study relu-revival --preset gpu --out "$out/relu-revival-gpu"
  ;;
removal)
  model=$("$python" -c "from pathlib import Path
from examples.real_models.packages import SMOLLM2
print(SMOLLM2.path(Path('.')))") || exit 2
  check removal-gpu 590 -m normfree remove-norm "$model" --corpus installed-python --yes --out "$out/removal" \
    --steps 600 --set recipe.batch_size=64 --set recipe.micro_batch_size=64 --set data.sequence_length=512 \
    --set data.train_tokens=19660800 --set data.eval_tokens=131072 --set recipe.eval_steps=30
  ;;
*)
  echo "no such part: '$part'; it can be timings, study or removal" >&2
  exit 2
  ;;
esac
