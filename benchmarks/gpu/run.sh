#!/usr/bin/env bash
# A prepared run on a GPU machine without a network: unpacks this kit and runs its parts, in one command of 590 seconds.
#   ./run.sh                              all parts, in the order of their value
#   ./run.sh train_sft probe              these parts            ./run.sh --list    what there is
#   ./run.sh --tiny --data ...            further options: ./run.sh --help
# Results, at most eight files with page.md among them, go to the folder $OUT (default: ./gpu-results).
# MOLMO2_PYTHON: the Python that has torch.  MOLMO2_KIT: where to unpack (default: a folder in $TMPDIR or /tmp).
set -euo pipefail
kit=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
python=${MOLMO2_PYTHON:-python3}
case $python in */*) python=$(absolute "$python") ;; esac # a name alone is looked for in $PATH
command -v "$python" > /dev/null || { echo "kit: no such Python: $python; name one in MOLMO2_PYTHON" >&2; exit 2; }
folder=$(absolute "${MOLMO2_KIT:-${TMPDIR:-/tmp}/molmo2-gpu-kit-$(id -u)}")
out=$(absolute "${OUT:-gpu-results}")
begun=$(date +%s)
"$python" "$kit/unpack.py" "$kit" "$folder"
export PYTHONPATH="$folder/project:$folder/molmo2-overlay/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m benchmarks.gpu.run --kit "$kit" --data "$kit/data" --out "$out" --begun "$begun" "$@"
