#!/usr/bin/env bash
# The clients people use, in pinned versions under target/clients, against the debug binary with the embedded model.
# Arguments go to pytest; with any, the tests in JavaScript are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/need-ffmpeg.sh
scripts/need-python-packages.sh clients
command -v node >/dev/null && command -v npm >/dev/null || scripts/install.sh "to run the clients in JavaScript" nodejs npm

here=target/clients
if ! cmp -s tests/clients/package-lock.json "$here/package-lock.json" || [ ! -d "$here/node_modules" ]; then
  cp tests/clients/package.json tests/clients/package-lock.json "$here/"
  (cd "$here" && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error)
fi

[ -x target/debug/tinyllava ] || cargo build --locked --bin tinyllava
"$here/venv/bin/pytest" -p no:cacheprovider -W ignore::UserWarning tests/clients "$@"
if [ $# -eq 0 ]; then
  # Imports are looked for beside the file that has them.
  cp tests/clients/*.mjs "$here/"
  node --test "$here"/*.test.mjs
fi
