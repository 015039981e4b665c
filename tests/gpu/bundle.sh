#!/usr/bin/env bash
# bundle.sh [PACKAGE...]: gathers into build/gpu-bundle what a machine with a card and no network lacks: this checkout
# with its built libraries, and wheels for Python 3.12. There: SAIL_WHEELS=../wheels make -C sail-ops gpu-check
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/gpu-bundle most=60 python=${PYTHON:-python3}
rm -rf "$out" && mkdir -p "$out/wheels" "$out/sail-ops"
git archive HEAD | tar -x -C "$out/sail-ops"
git rev-parse HEAD >"$out/sail-ops/COMMIT"  # for the results: there is no git
if command -v nvcc >/dev/null; then  # with CUTLASS's grouped GEMM, the second opinion on ours
  "$python" -m pip install --quiet --no-deps --constraint constraints.txt nvidia-cutlass
  export SAIL_OPS_CUDA=ON SAIL_OPS_CUTLASS=ON
else
  echo "no nvcc here: the other machine builds the CUDA library, if it has one"
fi
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$built" .
"$python" -m zipfile -e "$built"/sail_ops-*.whl "$built"
cp "$built"/sail_ops/*.so "$out/sail-ops/sail_ops/"
cp -r "$built"/sail_ops-*.dist-info "$out/sail-ops/"  # the version, where setuptools is none or old
# what a machine with torch, pytest, hypothesis and transformers still lacks; more by name: bundle.sh transformers ...
wheels=(pytest-timeout pytest-benchmark py-cpuinfo liger-kernel "$@")
# of DeepSpeed what it imports: its optimizers that are compiled on first use, with ninja, are not used here
wheels+=(einops hjson msgpack psutil pydantic pydantic-core annotated-types typing-inspection)
platforms=()
for p in manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 any; do platforms+=(--platform "$p"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --constraint constraints.txt --dest "$out/wheels" "${wheels[@]}"
# DeepSpeed has no wheel to download; without its compiled operators it is Python alone
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir "$out/wheels" deepspeed
size=$(du -sm "$out" | cut -f1)
echo "$out: $size MB, $(find "$out/wheels" -name '*.whl' | wc -l) wheels"
[ "$size" -le "$most" ] || { echo "more than $most MB"; exit 1; }
