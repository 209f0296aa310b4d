#!/usr/bin/env bash
# The suite in an environment of its own: style, types, tests. Arguments go to pytest.
# As root on Debian it installs Slurm's packages, once, for the tests that run a cluster; elsewhere these are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh .venv-test test
export PATH="$PWD/.venv-test/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
./tests/slurm/install.sh
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
