#!/usr/bin/env bash
# Everything that needs a GPU, in at most 8 minutes from a fresh checkout. Needs no network: Python 3.10+ with torch,
# triton, pytest, pytest-benchmark, pytest-xdist, typer, rich and pybind11, and nvcc, cmake and ninja must be
# installed. Wheels in wheels/ of the checkout are installed first.
#
#   bench/gpu.sh [--dry-run] [prepare] [tests] [sanitize] [targets]        default: all four, in this order
#
#   prepare    at most 120 s   builds the native module and compiles the Triton kernels of the other steps, in parallel
#   tests      at most 150 s   the GPU tests that are not slow
#   sanitize   at most  60 s   memcheck and racecheck of each operator at tiny sizes, all at once
#   targets    at least 150 s  bench/targets.py, most important first; also uses the time left by earlier steps
#                      480 s
#
#   --dry-run          runs the script's steps on the CPU at tiny sizes; without the native build, CUDA and
#                      compute-sanitizer
#   PYTHON             Python to use; default python3
#   FLMOE_GPU_BUDGET   total seconds; default 480
#   OUT                folder for results; default bench/results/<device name>/
#   FLMOE_COMMIT       the commit, if the files are not a git checkout
#
# Results are written as soon as they exist: a line of JSON for each step in steps.jsonl and for each target in
# targets.jsonl. If a test hangs or breaks the CUDA context, only that test is lost. Exit code: 0, or 1 if a step
# failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON="${PYTHON:-python3}"
BUDGET="${FLMOE_GPU_BUDGET:-480}"
PREPARE=120 TESTS=150 SANITIZE=60
TABLE=10      # seconds for the table of the targets
KILL_AFTER=10 # seconds between SIGINT and SIGKILL, for partial output
DRY='' STEPS=()
for word in "$@"; do
    case "$word" in
        --dry-run) DRY=1 ;;
        prepare | tests | sanitize | targets) STEPS+=("$word") ;;
        *)
            echo "gpu.sh: expected --dry-run, prepare, tests, sanitize or targets, got '$word'" >&2
            exit 2
            ;;
    esac
done
[ ${#STEPS[@]} -gt 0 ] || STEPS=(prepare tests sanitize targets)
DEVICE=cuda
if [ -n "$DRY" ]; then
    DEVICE=cpu
    export OMP_NUM_THREADS=1 # threads that wait for each other take longer than tiny calls
fi
if [ -z "${OUT:-}" ]; then
    name=$("$PYTHON" -c "from flmoe_kernels.profile.environment import device_name
print('-'.join(''.join(c if c.isalnum() else ' ' for c in device_name('$DEVICE').lower()).split()))") || {
        echo "== no $DEVICE device"
        exit 1
    }
    OUT=bench/results/$name
    [ -z "$DRY" ] || OUT=$(mktemp -d)
fi
mkdir -p "$OUT"
rm -f "$OUT"/{steps,targets}.jsonl
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -p bench.isolation --max-worker-restart 100)

# run STEP LIMIT COMMAND...: run with a time limit; the result is a line of steps.jsonl, and the script continues.
run() {
    local step=$1 limit=$2 left=$((BUDGET - SECONDS)) code began=$SECONDS
    shift 2
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -le "$KILL_AFTER" ]; then
        code=skipped
    else
        echo "== $step, at most $limit s: $*"
        # Programs in the background ignore SIGINT.
        timeout --signal="${SIGNAL:-INT}" --kill-after="$KILL_AFTER" $((limit - KILL_AFTER)) "$@"
        code=$?
    fi
    echo "== $step: exit code $code after $((SECONDS - began)) s"
    echo "{\"step\": \"$step\", \"code\": \"$code\", \"seconds\": $((SECONDS - began))}" >>"$OUT/steps.jsonl"
}

step_prepare() {
    if [ -n "$DRY" ]; then
        run "compile kernels" $PREPARE "$PYTHON" -m bench.warm sm_90 routing
        return
    fi
    local end=$((SECONDS + PREPARE))
    if [ -d wheels ]; then
        run wheels 30 "$PYTHON" -m pip install --quiet --no-index --no-deps wheels/*.whl
    fi
    # Editable, so that the native module is in the checkout, where the tests import it.
    FLMOE_CUDA=1 SIGNAL=TERM run install $((end - SECONDS)) \
        "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable . &
    run "compile kernels" $((end - SECONDS)) "$PYTHON" -m bench.warm
    wait
}

step_tests() {
    if [ -n "$DRY" ]; then
        TRITON_INTERPRET=1 run tests $TESTS "${PYTEST[@]}" -n 0 tests/gpu/test_ops.py -k smallest
        return
    fi
    # The tests compute their references on the CPU, so several run at once.
    OMP_NUM_THREADS=4 run tests $TESTS "${PYTEST[@]}" -n 4 -m "not slow" \
        tests/gpu tests/core/test_cuda_device.py tests/ops/test_routing_cuda.py
}

step_sanitize() {
    local tool operator logs
    if [ -n "$DRY" ]; then
        run sanitize $SANITIZE "$PYTHON" -m bench.sanitize cpu
        return
    fi
    logs=$(mktemp -d)
    for tool in memcheck racecheck; do
        for operator in interaction_moe pair_moe routed_mlp expert_attention routing; do
            # torch's caching allocator would hide reads past the end of a tensor.
            OMP_NUM_THREADS=2 PYTORCH_NO_CUDA_MEMORY_CACHING=1 SIGNAL=TERM run "$tool $operator" $SANITIZE \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m bench.sanitize cuda "$operator" \
                >"$logs/$tool-$operator" 2>&1 &
        done
    done
    wait
    cat "$logs"/* >"$OUT/sanitize.log"
    tail -n 3 "$logs"/*
}

step_targets() {
    local chosen=(-n 1 --limit 100)
    [ -z "$DRY" ] || chosen=(-n 0 -k "mimic or grouped_mm")
    run targets $((BUDGET - SECONDS - TABLE)) "${PYTEST[@]}" "${chosen[@]}" bench/targets.py \
        --device "$DEVICE" --lines "$OUT/targets.jsonl"
    [ ! -f "$OUT/targets.jsonl" ] || "$PYTHON" -m bench.targets "$OUT/targets.jsonl"
}

for step in "${STEPS[@]}"; do
    "step_$step"
done
echo "== results in $OUT, $SECONDS s of $BUDGET:"
cat "$OUT/steps.jsonl"
! grep -qv '"code": "0"' "$OUT/steps.jsonl"
