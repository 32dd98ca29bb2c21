"""What every benchmark of a peer shares: the machine it ran on, repeated timing, one JSON form.

Used by torch_bench.py, llama_bench.py and frames_bench.py. Never imports a peer.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time


def cores():
    """The cores this process may use: what taskset left it."""
    return sorted(os.sched_getaffinity(0))


def arguments(description):
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=at_least_one, default=len(cores()), help="threads [default: the cores of taskset]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file as well")
    return parser


def at_least_one(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def machine(threads):
    """Where the numbers come from. The load says whether the machine was idle: it should be near 0."""
    if threads > len(cores()):
        print(f"warning: {threads} threads on {len(cores())} cores", file=sys.stderr)
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": cores(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def seconds(function, repeat, warm_up=1, finish=lambda: None):
    """Runs `function` `warm_up` times for nothing, then `repeat` times; the seconds of each of those. `finish` waits for
    what a device has yet to do."""
    for _ in range(warm_up):
        function()
    finish()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - start)
    return times


def milliseconds(times):
    """Median, smallest and all of them, in milliseconds."""
    in_ms = [round(1e3 * t, 4) for t in times]
    return {"median_ms": round(statistics.median(in_ms), 4), "min_ms": min(in_ms), "all_ms": in_ms}


def report(result, path):
    """Prints the result as JSON to standard output, and to a file if one is wanted."""
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")
