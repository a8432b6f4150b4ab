#!/usr/bin/env bash
# All that needs a GPU, in one call of at most ten minutes: every kernel against the reference, whole networks, timings.
#
#     tests/device/run.sh [OUT.json]
#
# PYTHON names an interpreter that has qsearch, its extra `cuda` and torch; without it a virtual environment is made.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-device.json}
if [ -z "${PYTHON:-}" ]; then
    venv=$(mktemp -d)/venv
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q -e '.[cuda,imagenet]'
    PYTHON=$venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" tests/device/check.py --out "$out" --seconds 540
