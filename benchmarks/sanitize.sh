#!/usr/bin/env bash
# Bad memory accesses and races of the kernels, by compute-sanitizer, on an NVIDIA GPU; takes some minutes, most of
# them for compiling MLX's own operations. LIMIT gives the seconds of each of the three runs.
#
#     benchmarks/sanitize.sh        (PYTHON=.venv/bin/python benchmarks/sanitize.sh)
#
# Exit status: 0 without findings, 1 with findings or when a tool ran out of time, 2 where the tool is not installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -z "${tool}" ]; then
  echo 'compute-sanitizer must be installed, it is neither on the PATH nor in /usr/local/cuda*/bin; install the CUDA toolkit' >&2
  exit 2
fi
# Kernels one by one, not in graphs, so that reports name them. Only this package's are instrumented.
export MLX_USE_CUDA_GRAPHS=0 MLX_ENABLE_TF32=0 PYTHONPATH="${PYTHONPATH:+${PYTHONPATH}:}."

status=0
check() {
  local name=$1 start=${SECONDS} done=0
  shift
  echo "=== ${name}"
  timeout -k 2 "${limit}" "$@" "${python}" benchmarks/sanitize.py 2>&1 | tail -n 60
  done=${PIPESTATUS[0]}
  [ "${done}" -eq 124 ] && echo "${name} was stopped after ${limit} s"
  echo "=== ${name}: $((SECONDS - start)) s, exit status ${done}"
  [ "${done}" -eq 0 ] || status=1
}
common=(--kernel-regex kns=kvq_ --error-exitcode 9 --print-limit 20)

limit=${LIMIT:-180} check 'no tool: kernels are compiled'
limit=${LIMIT:-180} check memcheck "${tool}" --tool memcheck "${common[@]}"
limit=${LIMIT:-180} check racecheck "${tool}" --tool racecheck --racecheck-report all "${common[@]}"
exit "${status}"
