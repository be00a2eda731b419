#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and within a budget: build, GPU tests, compute-sanitizer, and all
# benchmarks against their peers. Needs no network: Python 3.10+ with torch, triton and pytest, nvcc, cmake, ninja and
# pybind11 must be there.
#
#   bench/gpu.sh [--dry-run] [install] [tests] [sanitize] [bench]        default: all four, in this order
#
#   PYTHON             which Python; default python3
#   FLMOE_GPU_BUDGET   seconds in all; default 480. A step gets what is left, and no more than its own limit.
#   FLMOE_GPU_LEAST    seconds below which a step is not started; default 15
#   FLMOE_GPU_DEVICE   default cuda; with cpu the CPU stands in, which proves the way and no number
#   OUT                where results go; default bench/results/<device name>/
#   FLMOE_COMMIT       the commit, where the files are no git checkout
#
# --dry-run: tiny sizes on the CPU, nothing is installed or timed in earnest. Exit code: 0, or 1 where a step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON="${PYTHON:-python3}"
BUDGET="${FLMOE_GPU_BUDGET:-480}"
DEVICE="${FLMOE_GPU_DEVICE:-cuda}"
INSTALL_LIMIT=240 TESTS_LIMIT=180 SANITIZE_LIMIT=90 BENCH_LIMIT=480
LEAST="${FLMOE_GPU_LEAST:-15}"
DRY_RUN=""
STEPS=()
for argument in "$@"; do
    case "$argument" in
        --dry-run) DRY_RUN=1 ;;
        install | tests | sanitize | bench) STEPS+=("$argument") ;;
        *)
            echo "gpu.sh: unknown step '$argument': expected install, tests, sanitize, bench or --dry-run" >&2
            exit 2
            ;;
    esac
done
[ ${#STEPS[@]} -gt 0 ] || STEPS=(install tests sanitize bench)
if [ -n "$DRY_RUN" ]; then
    DEVICE=cpu
fi
export FLMOE_GPU_DEVICE="$DEVICE"

start=$SECONDS
failed=()

left() { echo $((BUDGET - (SECONDS - start))); }

# A step's deadline: its own limit, or what is left of the budget.
deadline() {
    local rest
    rest=$(left)
    echo $((rest < $1 ? rest : $1))
}

# run STEP LIMIT COMMAND...: with a deadline; what fails or is cut off is remembered, and the rest goes on.
run() {
    local step=$1 limit=$2 seconds code began=$SECONDS
    shift 2
    seconds=$(deadline "$limit")
    if [ "$seconds" -lt "$LEAST" ]; then
        echo "== $step: skipped, $seconds s are left of $BUDGET"
        failed+=("$step (skipped)")
        return
    fi
    echo "== $step, at most $seconds s: $*"
    timeout --kill-after=10 "$seconds" "$@"
    code=$?
    case $code in
        0) echo "== $step: done in $((SECONDS - began)) s" ;;
        124 | 137) echo "== $step: stopped after $seconds s"; failed+=("$step (stopped)") ;;
        *) echo "== $step: failed with exit code $code"; failed+=("$step") ;;
    esac
}

step_install() {
    if [ -n "$DRY_RUN" ]; then
        echo "== install: left out in a dry run"
        return
    fi
    # Editable: the native module then lies in the checkout, where the tests and this script import from.
    FLMOE_CUDA=1 run install "$INSTALL_LIMIT" \
        "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
    run info 60 "$PYTHON" -c \
        'from flmoe_kernels.core.backend import backend_status as s; [print(k, *v) for k, v in s().items()]'
}

step_tests() {
    run tests "$TESTS_LIMIT" "$PYTHON" -m pytest -q -p no:cacheprovider \
        tests/gpu tests/core/test_cuda_device.py tests/ops/test_routing_cuda.py
}

step_sanitize() {
    local module=(-m flmoe_kernels.profile.gpu --sanitize --device "$DEVICE") tool
    if [ "$DEVICE" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitize: no compute-sanitizer here; the same calls without it"
        run "sanitize (without the tool)" "$SANITIZE_LIMIT" "$PYTHON" "${module[@]}"
        return
    fi
    for tool in memcheck racecheck; do
        # torch's allocator would hide a kernel's reads past the end of a tensor.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize ($tool)" "$SANITIZE_LIMIT" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" "${module[@]}"
    done
}

step_bench() {
    local seconds options=()
    seconds=$(deadline "$BENCH_LIMIT")
    # The module keeps its own budget, which ends before the deadline: starting and writing take time as well.
    options=(--device "$DEVICE" --budget $((seconds - 20)))
    [ -z "$DRY_RUN" ] || options+=(--dry-run --seconds 0.2)
    run bench "$BENCH_LIMIT" "$PYTHON" -m flmoe_kernels.profile.gpu "${options[@]}"
}

for step in "${STEPS[@]}"; do
    "step_$step"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "== not done: ${failed[*]}"
    exit 1
fi
