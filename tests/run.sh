#!/usr/bin/env bash
# The suite in an environment of its own: style, types, tests. Arguments go to pytest.
# As root on Debian it installs Slurm and Chromium, once, for the tests that need them; elsewhere these are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh .venv-test test
export PATH="$PWD/.venv-test/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
./tests/packages.sh
# Meanwhile DeepSpeed builds its operator, which the first test would wait for.
export TORCH_EXTENSIONS_DIR="$PWD/.venv-test/torch_extensions"
python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null 2>&1 &
ruff check .
ruff format --check .
mypy
wait
# Files with the fixtures they share stay on one worker, and begin in their order: the longest are not the last. Behind them come the
# tests that need the machine for themselves, one by one. pytest says 5 where it was to run none of them.
code=0
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" "$@" || code=$?
[[ $code == [05] ]] || exit $code
python -m pytest -m alone "$@" || { found=$?; [[ $found == 5 ]] && exit $code || exit $found; }
