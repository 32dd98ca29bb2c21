#!/usr/bin/env bash
# Installs what this project needs besides Rust, and says so: ffmpeg, curl and a C compiler.
set -euo pipefail

missing=()
command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || missing+=(ffmpeg)
command -v cc >/dev/null || missing+=(build-essential)
command -v curl >/dev/null || missing+=(curl)
[ ${#missing[@]} -eq 0 ] || "$(dirname "$0")/install.sh" "to decode videos and to build" "${missing[@]}"
