#!/usr/bin/env bash
# Everything that needs a GPU, offline and in under 9 minutes: builds the extension in place, runs
# the GPU tests, measures operators and models, and prints a short table last.
#
#   benchmarks/gpu.sh OUT_DIR [pytest option…]
#
# OUT_DIR receives ops.json, models.json and the log of each section. A section that fails or runs
# out of its time does not stop the others; the exit status is 1 if any of them did. PYTHON names
# the interpreter (default: python3).
set -u
[ $# -ge 1 ] || { echo "usage: benchmarks/gpu.sh OUT_DIR [pytest option…]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
status=0

section() { # section NAME SECONDS COMMAND…
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped at its limit of $limit s" ;;
    5) echo "$name: no tests" ;; # pytest selected nothing
    *) echo "$name: failed with status $code, see $name.log" ;;
  esac
  case $code in 0 | 5) ;; *) tail -n 15 "$out/$name.log"; status=1 ;; esac
}

rm -f "$out/ops.json" "$out/models.json"
# 90 + 130 + 130 + 175 seconds: 525, and 10 for the rest.
section build 90 "$python" setup.py build_ext --inplace
section tests 130 "$python" -m pytest -q -m gpu tests
section ops 130 "$python" -m pytest -q benchmarks/bench_ops.py \
  --out "$out/ops.json" --full --budget 110 "$@"
section models 175 "$python" -m pytest -q benchmarks/bench_models.py \
  --out "$out/models.json" --full --budget 140 "$@"
"$python" -m benchmarks.record "$out/ops.json" "$out/models.json"
exit $status
