#!/usr/bin/env bash
# Runs other projects' gateways, in pinned versions under target/gateways, before servers on the
# embedded model. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/need-ffmpeg.sh
scripts/need-python-packages.sh gateways
[ -x target/debug/tinyllava ] || cargo build --locked --bin tinyllava
exec target/gateways/venv/bin/pytest -p no:cacheprovider tests/gateways "$@"
