#!/usr/bin/env bash
# From a fresh machine to a trained search model: environment, data, training with mining beside it, results.
# Needs Debian 12 or Ubuntu, Python >= 3.11, two cores; no GPU, no hub. Run it again to go on where it stopped.
#   PYTHON=python3.12 ./launch/quickstart.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

./launch/install.sh .venv notebook # what `import negpool` needs, too
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -d data/code ]; then
  echo "== building data/code: docstring -> function, from the Python packages installed here" >&2
  negpool data code --out data/code --max-functions 2400
fi
negpool run launch/jobs/quickstart.toml "$@"
echo "These commands are found after:  source .venv/bin/activate" >&2
