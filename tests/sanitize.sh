#!/usr/bin/env bash
# The CPU library with AddressSanitizer and UBSan, under the edge cases of the tests: make sanitize
# Torch's own code is not instrumented, but its tensors are: an access beside one is found.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${VENV:-.venv}")
build=$PWD/build/sanitize
mkdir -p "$build"

"$venv/bin/cmake" -GNinja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" -S . -B "$build" \
  -DSAIL_OPS_CUDA=OFF -DSAIL_OPS_SANITIZE=address,undefined >"$build/configure.log"
"$venv/bin/cmake" --build "$build" --target sail_ops_cpu

export SAIL_OPS_LIBRARY_DIR=$build
export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64  # python itself leaks at exit
# libstdc++ too: ASan looks for __cxa_throw when it starts, and python has not loaded it by then
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"

# a control: a tensor of 8 elements over an array of 7 must be found
control='
import numpy, torch, sail_ops
short = numpy.lib.stride_tricks.as_strided(numpy.ones(7, "float32"), (1, 8))
sail_ops.rms_norm(torch.from_numpy(short), torch.ones(8))'
found=$(LD_PRELOAD=$preload "$venv/bin/python" -c "$control" 2>&1 || true)
if [[ $found != *heap-buffer-overflow* ]]; then
  echo "sanitize: the control was not found: the run would show nothing" >&2
  exit 1
fi

if [ $# -eq 0 ]; then  # the tests named like a host file
  # empty_cache: what is freed stays resident in the sanitizer's quarantine
  set -- -m "not slow" -k "not empty_cache"
  for source in csrc/cpu/*.cpp; do
    test=tests/ops/test_$(basename "$source" .cpp).py
    [ ! -e "$test" ] || set -- "$@" "$test"
  done
fi
# --capture=sys: a report goes to the terminal and ends the process
read -ra workers <<<"${WORKERS:-}"  # pytest-xdist's options, the Makefile's; one process without
LD_PRELOAD=$preload "$venv/bin/python" -m pytest -q -p no:cacheprovider --capture=sys "${workers[@]}" "$@"
