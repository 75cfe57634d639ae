#!/usr/bin/env bash
# The way of docs/first-steps.md, timed: a fresh clone, a fresh environment, no packages and no models in any cache.
#
#     benchmarks/newcomer.sh [FOLDER]        (a new folder in the temporary one by default; it is left there)
#
# Prints each command, what it prints, and its seconds. Needs what README names: git, python3, make, g++, and on Linux
# libopenblas0-pthread, without which reading prompts takes ten times as long.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "${folder}"
cd "${folder}"
# MLX keeps the kernels that it compiled for the CPU in the temporary folder.
export KVQ_CACHE_DIR="${folder}/models" TMPDIR="${folder}/tmp" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "${TMPDIR}"
unset PYTHONPATH VIRTUAL_ENV

total=0
step() {
  local start=${SECONDS} took
  echo "\$ $*"
  eval "$@"
  took=$((SECONDS - start))
  total=$((total + took))
  echo "[${took} s]"
  echo
}

step git clone --quiet "${source}" mlx-kvq-plugin
cd mlx-kvq-plugin
step make setup
step make demo
openblas=$(compgen -G '/usr/lib/*/openblas-pthread/libopenblas.so.0' | head -n 1 || true)
[ -z "${openblas}" ] || export LD_PRELOAD=${openblas}
source .venv/bin/activate
step kvq generate demo:smollm2 --kv-scheme tq4 --prompt "'Name three rivers.'" --max-tokens 40
step kvq cache create demo:smollm2 --kv-scheme tq3 --prompt @examples/document.txt --out story.safetensors
step kvq generate --prompt-cache story.safetensors --prompt "'In which year was the lighthouse built?'" --max-tokens 40
echo "[${total} s in all]"
