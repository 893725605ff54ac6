#!/usr/bin/env bash
# shellcheck disable=SC2329  # functions are called through `run`
#
# Everything that wants an NVIDIA GPU, on a machine without a network: builds in place with the torch that is there,
# tests, measures, looks for bad accesses.
#   bench/gpu.sh DIR             all parts
#   bench/gpu.sh DIR build bench the parts named, of: build tests bench summary sanitize
# It ends within EQUIFAST_GPU_SECONDS (570): what is under way then is stopped, and what does not begin any more is left
# out. Logs and JSON, at most eight files, are written to DIR as they come; `summary` makes summary.md of what is there,
# and is made at the end in any case. A part that fails does not keep the next ones from running, and the exit status
# says so.
set -euo pipefail

if [ "$#" -lt 1 ]; then
  sed -n '4,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=("$@")
[ "${#parts[@]}" -gt 0 ] || parts=(build tests bench summary sanitize)
for part in "${parts[@]}"; do
  case $part in
    build | tests | bench | summary | sanitize) ;;
    *) echo "there is no part \"$part\"; the parts are build, tests, bench, summary, sanitize" && exit 2 ;;
  esac
done
python=${PYTHON:-python3}
end=$((SECONDS + ${EQUIFAST_GPU_SECONDS:-570}))
scratch=$(mktemp -d -t equifast-gpu.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
cd "$root"

# The package is imported from the checkout, which `build` has put the compiled parts into.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 EQUIFAST_BACKEND=native
export PATH="$PATH:/usr/local/cuda/bin"

# within SECONDS COMMAND...: for that long at most, and until the end.
within() {
  local limit=$1 left=$((end - SECONDS))
  shift
  [ "$left" -gt 5 ] || { echo "LEFT OUT: the time is over"; return 124; }
  timeout --signal=INT --kill-after=15 "$((limit < left ? limit : left))" "$@"
}

# run NAME FUNCTION: its output goes to the terminal and to DIR/NAME.log; its status and seconds to DIR/parts.
run() {
  local name=$1 status=0 start=$SECONDS
  printf '\n=== %s\n' "$name"
  "$2" 2>&1 | tee "$out/$name.log" || status=$?
  touch "$out/parts"
  grep -v "^$name " "$out/parts" >"$scratch/parts" || true
  printf '%s %d %d\n' "$name" "$status" $((SECONDS - start)) >>"$scratch/parts"
  cp "$scratch/parts" "$out/parts"
  return "$status"
}

configure_and_build() {
  local generator=(-G Ninja)
  command -v ninja >/dev/null || generator=()
  # CMake's own guess where the driver does not tell which GPU there is
  local architecture
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || true
  [ -z "$architecture" ] || generator+=("-DCMAKE_CUDA_ARCHITECTURES=$architecture-real")
  within 300 cmake -S . -B build/gpu "${generator[@]}" -DEQUIFAST_TESTS=OFF \
    -DPython_EXECUTABLE="$(command -v "$python")" &&
    within 300 cmake --build build/gpu -j "$(nproc)" &&
    within 60 cmake --install build/gpu --prefix equifast &&
    within 60 "$python" -c 'import torch, equifast.ops as ops
print("torch", torch.__version__, torch.cuda.get_device_name(), "native:", ops.choose(torch.device("cuda")).reason)'
}

gpu_tests() {
  # the project's own options ask for xdist, which need not be there
  local several=(-o "addopts=--strict-config --strict-markers")
  if "$python" -c 'import xdist' 2>/dev/null; then several+=(-n 8 -p no:benchmark); fi
  within 240 "$python" -m pytest -q -p no:cacheprovider -m gpu --maxfail=25 --tb=short "${several[@]}" \
    tests/test_native.py tests/test_gpu.py tests/test_step_triton.py
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
  local tool status=0 only=() quiet=()
  if ! command -v compute-sanitizer >/dev/null; then
    echo "LEFT OUT: there is no compute-sanitizer here"
    return 0
  fi
  # its option for that has had several names: with another one all of PyTorch's kernels are looked at too
  if compute-sanitizer --help | grep -q -e '--kernel-regex '; then only=(--kernel-regex kns=equifast); fi
  for tool in memcheck racecheck; do
    echo "--- $tool"
    quiet=()  # calls of PyTorch that fail on purpose are no errors
    [ "$tool" != memcheck ] || quiet=(--report-api-errors no)
    # torch's caching would hide what lies beyond a tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${only[@]}" "${quiet[@]}" "$python" "$scratch/kernels.py" || status=$?
  done
  return "$status"
}

benchmark() {
  local status=0
  within 180 "$python" bench/bench_gpu.py --output "$out/gpu.json" || status=$?
  within 120 "$python" bench/bench_ops.py --device cuda --output "$out/ops-cuda.json" || status=$?
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
    for name in build tests bench sanitize; do
      outcome="not run" seconds=""
      if [ -e "$out/parts" ] && grep -q "^$name " "$out/parts"; then
        read -r _ status seconds <<<"$(grep "^$name " "$out/parts")"
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
}

failed=0
for part in "${parts[@]}"; do
  case $part in
    build) run build configure_and_build || failed=1 ;;
    tests) run tests gpu_tests || failed=1 ;;
    bench) run bench benchmark || failed=1 ;;
    sanitize) run sanitize sanitize || failed=1 ;;
    summary) summarize ;;
  esac
done
summarize
cat "$out/summary.md"
exit "$failed"
