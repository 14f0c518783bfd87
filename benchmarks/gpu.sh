#!/usr/bin/env bash
# What needs a GPU, offline, in calls of under 9 minutes on 16 cores:
#
#   benchmarks/gpu.sh kernels|sweep|full|sanitize OUT_DIR [--tiny]
#
#   kernels   the self-test, a selection of the correctness tests; every Triton kernel alone
#   sweep     the kernels with other constants than those shipped; four of them under ncu
#   full      all GPU tests; operators and models against their peers; a profile of a training step
#   sanitize  memcheck and racecheck
#
# OUT_DIR receives the results line by line, and the log of each section. A section that fails or
# runs out of its time does not stop the others; the exit status is 1 if any of them did. PYTHON
# names the interpreter (default: python3). --tiny walks through all of it on any machine.
set -u
usage="usage: benchmarks/gpu.sh kernels|sweep|full|sanitize OUT_DIR [--tiny]"
[ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
step=$1
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
status=0
parallel=()
# By name: others need packages that a machine with a GPU may lack.
with_gpu_tests=(tests/backends/triton tests/ops tests/transfer/test_{graphs,loop,step}.py)
"$python" -c "import xdist" 2>/dev/null && parallel=(-n $(($(nproc) * 3 / 4)))

section() { # section NAME SECONDS COMMAND…
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  # Interrupted, so that pytest still reports.
  timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped at its limit of $limit s" ;;
    5) echo "$name: no tests" ;; # pytest selected nothing
    *) echo "$name: failed with status $code, see $name.log" ;;
  esac
  case $code in 0 | 5) ;; *) tail -n 15 "$out/$name.log"; status=1 ;; esac
}

gpu_tests() { # gpu_tests NAME SECONDS PYTEST-OPTION…
  local name=$1 limit=$2
  shift 2
  section "$name" "$limit" "$python" -m pytest -q -m gpu "${with_gpu_tests[@]}" \
    "${parallel[@]}" "$@"
}

case $step in
  kernels)
    section build 60 "$python" setup.py build_ext --inplace
    rm -f "$out/kernels.jsonl"
    section selftest 60 "$python" -m bitkern.selftest
    gpu_tests tests 150 -k "bfloat16 or graph or stream or weights"
    section kernels 240 "$python" -m benchmarks.kernels "$out/kernels.jsonl" "$@"
    ;;
  sweep)
    rm -f "$out/sweep.jsonl"
    for constants in "--stages 1" "--stages 2" "--stages 4" "--maxnreg 96" "--maxnreg 255" \
      "--tile 8" "--tile 32" "--resident 0" "--resident 176"; do
      # shellcheck disable=SC2086
      section "sweep${constants// /}" 45 \
        "$python" -m benchmarks.kernels "$out/sweep.jsonl" $constants "$@"
    done
    if command -v ncu >/dev/null; then
      section ncu 90 ncu --clock-control none --cache-control none --launch-count 40 --kill yes \
        -k "regex:group_norm_act_(forward|backward)_(reduce|apply)" --csv \
        --metrics dram__bytes.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum \
        "$python" -m benchmarks.kernels "$out/ncu.jsonl" "$@"
    fi
    ;;
  full)
    section build 60 "$python" setup.py build_ext --inplace
    rm -f "$out/ops.json" "$out/models.json"
    gpu_tests tests 170 -k "not sanitizer"
    section ops 110 "$python" -m pytest -q benchmarks/bench_ops.py \
      --out "$out/ops.json" --full --budget 95 "$@"
    section models 130 "$python" -m pytest -q benchmarks/bench_models.py \
      --out "$out/models.json" --full --budget 105 "$@"
    section step 50 "$python" -m benchmarks.step "$out" "$@"
    "$python" -m benchmarks.record "$out/ops.json" "$out/models.json"
    ;;
  sanitize)
    gpu_tests sanitize 500 -k sanitizer
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
exit $status
