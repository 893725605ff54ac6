#!/usr/bin/env bash
# shellcheck disable=SC2329  # functions are called through `run`
#
# Everything that wants an NVIDIA GPU, on a machine without a network: builds in place with the torch that is there,
# tests, looks for bad accesses, measures.
#   bench/gpu.sh DIR             all parts
#   bench/gpu.sh DIR build bench the parts named, of: build tests sanitize bench summary
# Each part takes a few minutes and leaves whole files in DIR, logs and JSON, or none; `summary` makes summary.md of
# what is there. A part that fails does not keep the next ones from running, and the exit status says so.
set -euo pipefail

if [ "$#" -lt 1 ]; then
  sed -n '4,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=("$@")
[ "${#parts[@]}" -gt 0 ] || parts=(build tests sanitize bench summary)
python=${PYTHON:-python3}
scratch=$(mktemp -d -t equifast-gpu.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
cd "$root"

# The package is imported from the checkout, which `build` has put the compiled parts into.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 EQUIFAST_BACKEND=native

# run NAME COMMAND...: the command's output goes to the terminal and, when it has ended, to DIR/NAME.log; its status
# to DIR/NAME.status.
run() {
  local name=$1 status=0 start=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  "$@" 2>&1 | tee "$scratch/$name.log" || status=$?
  mv "$scratch/$name.log" "$out/$name.log"
  printf '%d %d\n' "$status" $((SECONDS - start)) >"$scratch/status"
  mv "$scratch/status" "$out/$name.status"
  return "$status"
}

configure_and_build() {
  local generator=(-G Ninja)
  command -v ninja >/dev/null || generator=()
  cmake -S . -B build/gpu "${generator[@]}" -DEQUIFAST_TESTS=OFF -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build build/gpu -j "$(nproc)" &&
    cmake --install build/gpu --prefix equifast &&
    "$python" -c 'import torch, equifast.ops as ops
print("torch", torch.__version__, torch.cuda.get_device_name(), "native:", ops.choose(torch.device("cuda")).reason)'
}

gpu_tests() {
  "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_native.py tests/test_gpu.py tests/test_step_triton.py
}

# The kernels on small cases: warp and similarity with their derivatives, every layout, one dtype of each width.
cat >"$scratch/kernels.py" <<'PYTHON'
import sys

sys.path.insert(0, "tests")
import test_native
import torch

from equifast import ops

torch.cuda.init()
with ops.use("native"):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            for name in ("odd", "even", "column", "deep"):
                for first in range(0, 8, 3):
                    anchor, views, theta = test_native.problem(name, first, layout, dtype, "cuda")
                    leaves = [f.requires_grad_() for f in (anchor, *views)]
                    for reduction in ("image", "pixel"):
                        s = ops.similarity(leaves[0], leaves[1:], theta, reduction)
                        torch.autograd.grad(s.sum(), leaves)
                    warped = ops.warp(leaves[0], theta, [(v.shape[2], v.shape[3]) for v in views])
                    torch.autograd.grad(sum(w.sum() for w in warped), leaves[0])
    torch.cuda.synchronize()
print("all kernels ran")
PYTHON

sanitize() {
  local tool status=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "LEFT OUT: there is no compute-sanitizer here"
    return 0
  fi
  for tool in memcheck racecheck; do
    echo "--- $tool"
    # torch's caching would hide what lies beyond a tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" "$scratch/kernels.py" || status=$?
  done
  return "$status"
}

benchmark() {
  local name status=0
  "$python" bench/bench_ops.py --device cuda --output "$scratch/ops-cuda.json" || status=$?
  "$python" bench/bench_gpu.py --output "$scratch/gpu.json" || status=$?
  for name in ops-cuda gpu; do
    [ ! -e "$scratch/$name.json" ] || mv "$scratch/$name.json" "$out/$name.json"
  done
  return "$status"
}

summarize() {
  {
    echo "# equifast on a GPU"
    echo
    echo "- commit: $(git -c safe.directory='*' describe --always --dirty 2>/dev/null || echo unknown)"
    echo "- GPU: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo unknown)"
    echo "- torch: $("$python" -c 'import torch; print(torch.__version__)')"
    echo "- compiler: $(nvcc --version 2>/dev/null | sed -n 's/^Cuda compilation tools, //p')"
    echo
    echo "| part | outcome | seconds |"
    echo "|---|---|---|"
    local name status seconds outcome
    for name in build tests sanitize bench; do
      outcome="not run" seconds=""
      if [ -e "$out/$name.status" ]; then
        read -r status seconds <"$out/$name.status"
        outcome="exit status $status: $(tail -n 1 "$out/$name.log")"
      fi
      echo "| $name | $outcome | $seconds |"
    done
    if [ -e "$out/build.log" ] && grep -q 'kernel$' "$out/build.log"; then
      printf '\n## Registers and memory of the kernels\n\n```\n'
      grep -E '^ +(sm|[0-9]+) ' "$out/build.log"
      printf '```\n'
    fi
    if [ -e "$out/bench.log" ]; then
      printf '\n## Benchmarks\n\n```\n'
      tail -n 60 "$out/bench.log"
      printf '```\n'
    fi
  } >"$scratch/summary.md"
  mv "$scratch/summary.md" "$out/summary.md"
  cat "$out/summary.md"
}

failed=0
for part in "${parts[@]}"; do
  case $part in
    build) run build configure_and_build || failed=1 ;;
    tests) run tests gpu_tests || failed=1 ;;
    sanitize) run sanitize sanitize || failed=1 ;;
    bench) run bench benchmark || failed=1 ;;
    summary) summarize ;;
    *) echo "there is no part \"$part\"; the parts are build, tests, sanitize, bench, summary" && exit 2 ;;
  esac
done
exit "$failed"
