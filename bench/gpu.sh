#!/usr/bin/env bash
# All checks that need a GPU, within a time limit: build, GPU tests, compute-sanitizer, benchmarks against the peers.
# Needs no network. Python 3.10+ with torch, triton and pytest, nvcc, cmake, ninja and pybind11 must be installed. Wheels
# in wheels/ of the checkout are installed too. If pytest-benchmark is missing, download it first:
#   pip download --dest wheels pytest-benchmark
#
#   bench/gpu.sh [install] [tests] [sanitize] [bench]        default: all four, in this order
#
#   PYTHON             Python to use; default python3
#   FLMOE_GPU_BUDGET   total seconds; default 840. A step may use the remaining time, at most its own limit.
#   FLMOE_GPU_DEVICE   default cuda; with cpu the quick benchmarks run, to try the script
#   OUT                folder for results; default bench/results/<device name>/
#   FLMOE_COMMIT       the commit, if the files are not a git checkout
#
# The benchmarks of each operator run in a separate process and write a JSON file of pytest-benchmark. At the limit,
# SIGINT lets pytest write the results measured so far. Exit code: 0, or 1 if a step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON="${PYTHON:-python3}"
BUDGET="${FLMOE_GPU_BUDGET:-840}"
DEVICE="${FLMOE_GPU_DEVICE:-cuda}"
INSTALL_LIMIT=240 TESTS_LIMIT=180 SANITIZE_LIMIT=90 BENCH_LIMIT=240
LEAST=15 # seconds below which a step is not started
STEPS=("$@")
[ ${#STEPS[@]} -gt 0 ] || STEPS=(install tests sanitize bench)
for step in "${STEPS[@]}"; do
    case "$step" in
        install | tests | sanitize | bench) ;;
        *)
            echo "gpu.sh: unknown step '$step': expected install, tests, sanitize or bench" >&2
            exit 2
            ;;
    esac
done

start=$SECONDS
failed=()

# run STEP LIMIT COMMAND...: run with a time limit; if a step fails or is stopped, the script records it and continues.
run() {
    local step=$1 limit=$2 left=$((BUDGET - (SECONDS - start))) code began=$SECONDS
    shift 2
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt "$LEAST" ]; then
        echo "== $step: skipped, $left s left of $BUDGET"
        failed+=("$step (skipped)")
        return
    fi
    echo "== $step, at most $limit s: $*"
    timeout --signal=INT --kill-after=20 "$limit" "$@"
    code=$?
    case $code in
        0) echo "== $step: done in $((SECONDS - began)) s" ;;
        124 | 137) echo "== $step: stopped after $limit s"; failed+=("$step (stopped)") ;;
        *) echo "== $step: failed with exit code $code"; failed+=("$step") ;;
    esac
}

step_install() {
    if [ -d wheels ]; then
        run wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps wheels/*.whl
    fi
    # Editable, so that the native module is in the checkout, where the tests import it.
    FLMOE_CUDA=1 run install "$INSTALL_LIMIT" \
        "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
}

step_tests() {
    run tests "$TESTS_LIMIT" "$PYTHON" -m pytest -q -p no:cacheprovider \
        tests/gpu tests/core/test_cuda_device.py tests/ops/test_routing_cuda.py
}

step_sanitize() {
    local call=("$PYTHON" -m bench.sanitize "$DEVICE") tool
    if [ "$DEVICE" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitize: compute-sanitizer is not installed; running the same calls without it"
        run "sanitize (without the tool)" "$SANITIZE_LIMIT" "${call[@]}"
        return
    fi
    for tool in memcheck racecheck; do
        # torch's caching allocator would hide reads past the end of a tensor.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize ($tool)" "$SANITIZE_LIMIT" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "${call[@]}"
    done
}

step_bench() {
    local out="${OUT:-}" operator options=(--device "$DEVICE")
    if [ -z "$out" ]; then
        out=bench/results/$("$PYTHON" -c "from flmoe_kernels.profile.environment import device_name
print('-'.join(''.join(c if c.isalnum() else ' ' for c in device_name('$DEVICE').lower()).split()))") || { failed+=("bench (no device $DEVICE)"); return; }
    fi
    mkdir -p "$out"
    [ "$DEVICE" = cpu ] || options+=(--full)
    # The most important operators come first.
    for operator in interaction_moe pair_moe routed_mlp expert_attention routing; do
        run "bench $operator" "$BENCH_LIMIT" "$PYTHON" -m pytest "bench/test_$operator.py" -q -rs \
            -p no:cacheprovider "${options[@]}" --benchmark-json="$out/$operator.json"
    done
}

for step in "${STEPS[@]}"; do
    "step_$step"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed or skipped: ${failed[*]}"
    exit 1
fi
