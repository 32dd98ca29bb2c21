#!/usr/bin/env bash
# The clients people use, in pinned versions under target/clients, against the debug binary with the embedded model.
# Arguments go to pytest; with any, the tests in JavaScript are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/need-ffmpeg.sh
missing=()
command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
command -v node >/dev/null && command -v npm >/dev/null || missing+=(nodejs npm)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || { echo "Please install: ${missing[*]}" >&2; exit 1; }
  echo "Installing ${missing[*]} with apt-get (needed to run the clients)…"
  as_root=()
  [ "$(id -u)" -eq 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

here=target/clients
mkdir -p "$here"
# Installed again only when the pins have changed.
if ! cmp -s tests/clients/requirements.txt "$here/requirements.txt"; then
  rm -rf "$here/venv"
  python3 -m venv "$here/venv"
  "$here/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
  cp tests/clients/requirements.txt "$here/"
fi
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
