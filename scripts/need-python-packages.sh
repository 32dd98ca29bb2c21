#!/usr/bin/env bash
# need-python-packages.sh NAME: installs what tests/NAME/requirements.txt pins, into target/NAME/venv.
# Only when the pins have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

here=target/$1
pins=tests/$1/requirements.txt
command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null ||
  scripts/install.sh "for the Python packages of tests/$1" python3-venv
if ! cmp -s "$pins" "$here/requirements.txt"; then
  rm -rf "$here/venv"
  mkdir -p "$here"
  python3 -m venv "$here/venv"
  "$here/venv/bin/pip" install --quiet --disable-pip-version-check -r "$pins"
  cp "$pins" "$here/"
fi
