#!/usr/bin/env bash
# need-python-packages.sh NAME: installs the pins of tests/NAME/requirements*.txt into
# target/NAME/venv, if they have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

here=target/$1
wanted=$(cat "tests/$1"/requirements*.txt)
if [ "$wanted" = "$(cat "$here/installed" 2>/dev/null)" ]; then
  exit
fi
python3 -c 'import venv, ensurepip' 2>/dev/null ||
  scripts/install.sh "for the Python packages of tests/$1" python3-venv
rm -rf "$here/venv"
mkdir -p "$here"
python3 -m venv "$here/venv"
pip=("$here/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" -r "tests/$1/requirements.txt"
if [ -f "tests/$1/requirements-no-deps.txt" ]; then
  "${pip[@]}" --no-deps -r "tests/$1/requirements-no-deps.txt"
fi
echo "$wanted" >"$here/installed"
