#!/usr/bin/env bash
# The suite in an environment of its own: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh .venv-test test
export PATH="$PWD/.venv-test/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
