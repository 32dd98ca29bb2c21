"""Times how others fetch 16 frames of a video and resize them to 384 x 384 with Pillow, as the original does.

    taskset -c 0,1 python frames_bench.py .data/clip60-gop250.mp4 .data/clip60-gop48.mp4 .data/clip1200-gop250.mp4

Ways: `decord` (bulk fetch of the indices), `pyav` (seeking, as the original's scripts for Video-MME and MLVU do),
`pyav-full` (decoding everything from the start, as those scripts do where the frame rate varies), `pyav-full-threads`
(the same with every thread FFmpeg wants, which the original does not ask for).
Each runs in a process of its own, so that its largest resident size is its own.
"""
import importlib.metadata
import multiprocessing
import resource

import numpy as np
from PIL import Image

import common


def parse():
    parser = common.arguments("Times decord and PyAV at fetching and resizing sampled frames.")
    parser.add_argument("clips", nargs="+", metavar="CLIP")
    parser.add_argument("--num-frames", type=common.at_least_one, default=16)
    parser.add_argument("--size", type=common.at_least_one, default=384, help="side of the resized frames, pixels")
    parser.add_argument("--repeat", type=common.at_least_one, default=5)
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, with commas [default: all]")
    args = parser.parse_args()
    args.ways = args.ways.split(",")
    unknown = [way for way in args.ways if way not in WAYS]
    if unknown:
        parser.error(f"there is no way {unknown[0]!r}: choose from {', '.join(WAYS)}")
    return args


def sampled(total, num_frames):
    """Uniformly spaced indices, the first and the last frame among them."""
    return np.linspace(0, total - 1, num_frames, dtype=int)


def decord_batch(path, args):
    """All indices in one call: decord seeks and skips by itself."""
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=args.threads)
    batch = reader.get_batch(sampled(len(reader), args.num_frames)).asnumpy()
    return [Image.fromarray(frame) for frame in batch]


def pyav_seek(path, args):
    """From the last wanted frame to the first: seeks to the keyframe before it, and takes every wanted one from there on."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        ticks = float(1 / stream.time_base / stream.average_rate)
        wanted = [int(index * ticks) for index in np.unique(sampled(stream.frames, args.num_frames))]
        images = {}
        while wanted:
            container.seek(wanted[-1], stream=stream, backward=True, any_frame=False)
            here = None
            for frame in container.decode(stream):
                if here is None:
                    here = [pts for pts in wanted if pts >= frame.pts] or list(wanted)
                    wanted = wanted[: len(wanted) - len(here)]
                if frame.pts >= here[0]:
                    images[here.pop(0)] = frame.to_image()
                    if not here:
                        break
        return [images[pts] for pts in sorted(images)]


def pyav_full(path, args, threads=None):
    """Everything from the start; only the wanted frames are converted to RGB."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        if threads:
            stream.codec_context.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
        wanted = set(sampled(stream.frames, args.num_frames).tolist())
        return [frame.to_image() for i, frame in enumerate(container.decode(stream)) if i in wanted]


def pyav_full_threads(path, args):
    return pyav_full(path, args, args.threads)


WAYS = {"decord": decord_batch, "pyav": pyav_seek, "pyav-full": pyav_full, "pyav-full-threads": pyav_full_threads}


def resized(way, path, args):
    """`[frames, size, size, 3]` u8."""
    side = (args.size, args.size)
    return np.stack([np.asarray(image.resize(side, Image.BICUBIC)) for image in WAYS[way](path, args)])


def run(way, path, args):
    """In a process of its own: the times, the largest resident size, and the frames."""
    times = common.seconds(lambda: resized(way, path, args), args.repeat)
    largest_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return common.milliseconds(times) | {"max_resident_mb": round(largest_kib / 1000)}, resized(way, path, args)


def main():
    args = parse()
    result = {
        "peer": "frames",
        "versions": {name: importlib.metadata.version(name) for name in ("decord", "av", "pillow")},
        "machine": common.machine(args.threads),
        "num_frames": args.num_frames,
        "size": args.size,
        "clips": {},
    }
    processes = multiprocessing.get_context("spawn")
    for path in args.clips:
        first, ways = None, {}
        for way in args.ways:
            with processes.Pool(1) as pool:
                ways[way], frames = pool.apply(run, (way, path, args))
            first = frames if first is None else first
            # Ways that fetch the same frames differ by rounding only; 1 or more means other frames.
            same = frames.shape == first.shape
            ways[way]["mean_difference_from_first"] = round(float(np.abs(frames.astype(int) - first).mean()), 3) if same else None
        result["clips"][path] = ways
    common.report(result, args.json)


if __name__ == "__main__":
    main()
