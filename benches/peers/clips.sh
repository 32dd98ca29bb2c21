#!/usr/bin/env bash
# The clips of frames_bench.py and of `tinyllava bench frames`, into .data/ or the folder given. Needs ffmpeg with libx264.
set -euo pipefail
folder=${1:-"$(dirname "$0")/.data"}
mkdir -p "$folder"
cd "$folder"

# 60 s of 1280 x 720 at 25 frames a second, about 3 Mbit/s: a test picture with some noise, for alone it decodes too easily.
clip() { # name, frames between two keyframes at most
  [ -f "$1" ] && return
  ffmpeg -v error -y -f lavfi -i testsrc2=size=1280x720:rate=25 -t 60 -vf noise=alls=6:allf=t \
    -c:v libx264 -preset veryfast -crf 23 -g "$2" -threads 2 -pix_fmt yuv420p "part-$1"
  mv "part-$1" "$1"
}
clip clip60-gop250.mp4 250
clip clip60-gop48.mp4 48
# 20 minutes: the first one, twenty times, not encoded again.
if [ ! -f clip1200-gop250.mp4 ]; then
  ffmpeg -v error -y -stream_loop 19 -i clip60-gop250.mp4 -c copy part-clip1200-gop250.mp4
  mv part-clip1200-gop250.mp4 clip1200-gop250.mp4
fi
ls -l -- *.mp4
