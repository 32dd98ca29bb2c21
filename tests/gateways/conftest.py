"""What the gateway tests share: servers on the embedded model, gateways before them, and waiting with a bound."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = ROOT / "target/debug/tinyllava"
LOGS = ROOT / "target/gateways/logs"
DEMO = ROOT / "models/nano/demo"
# The folder of the programs that pip installed.
PROGRAMS = Path(sys.executable).parent
CHAT = "/v1/chat/completions"

for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"]:
    os.environ.pop(variable, None)


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(what, condition, seconds=30):
    """Returns the first true value of `condition`; a connection that fails counts as false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = condition()
        except httpx.TransportError:
            value = None
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"never came true: {what}")


class Process:
    """A program in the background, with its log in a file; it listens on 127.0.0.1 at `port`."""

    def __init__(self, name, port, command):
        self.port, self.url, self.command = port, f"http://127.0.0.1:{port}", command
        self.log = LOGS / f"{name}-{port}.log"
        self.process = None

    def start(self):
        LOGS.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def until_ok(self, path, seconds=60):
        def answers():
            assert self.process.poll() is None, self.last_lines()
            return httpx.get(self.url + path, timeout=5).status_code == 200

        until(f"{self.log.stem} answers {path}", answers, seconds)

    def last_lines(self):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


class Server(Process):
    """`tinyllava serve` on the embedded model. With KV events it publishes at `events` and replays at `replay`."""

    def __init__(self, *flags, kv_events=False):
        port, self.events_port, self.replay_port = free_ports(3)
        command = [BINARY, "serve", "--port", str(port), "--threads", "1", *flags]
        self.events, self.replay = (f"tcp://127.0.0.1:{each}" for each in (self.events_port, self.replay_port))
        if kv_events:
            command += ["--kv-events-endpoint", f"bind:{self.events}", "--kv-events-replay-endpoint", f"bind:{self.replay}"]
        super().__init__("server", port, command)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def metric(self, name):
        """The sum of a metric's samples; `name` may have labels."""
        lines = httpx.get(self.url + "/metrics", timeout=5).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(re.escape(name) + r"[ {]", line))

    def decodes(self):
        return int(self.metric('tinyllava_stage_seconds_count{stage="decode"}'))

    def running(self):
        return int(self.metric("vllm:num_requests_running"))


@contextmanager
def serving(number, *flags, **more):
    servers = [Server(*flags, **more) for _ in range(number)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.until_ok("/ready")
        yield servers
    finally:
        for server in servers:
            server.kill()


@contextmanager
def running(process):
    try:
        process.start()
        yield process
    finally:
        process.kill()


VIDEOS = sorted(DEMO.glob("*.mp4"))
QUESTIONS = ["What is shown?", "Which color is it?", "How many are there?"]


def data_url(clip):
    return "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()


def question(text, clip=None, **more):
    """The body of a chat request, about a clip if there is one."""
    content = [{"type": "text", "text": text}]
    if clip:
        content.insert(0, {"type": "video_url", "video_url": {"url": data_url(clip)}})
    return {"model": "nano", "temperature": 0, "messages": [{"role": "user", "content": content}]} | more


def ask(url, body, video_id=None):
    headers = {"x-video-id": video_id} if video_id else {}
    return httpx.post(url + CHAT, json=body, headers=headers, timeout=60)


class Stream:
    """A streamed reply that is read when asked for."""

    def __init__(self, url, body, video_id):
        self.client = httpx.Client(timeout=60)
        request = self.client.build_request(
            "POST", url + CHAT, json=body | {"stream": True}, headers={"x-video-id": video_id}
        )
        self.response = self.client.send(request, stream=True)
        self.lines = self.response.iter_lines()

    def next_event(self):
        for line in self.lines:
            if line.startswith("data: "):
                return line.removeprefix("data: ")
        return None

    def rest(self):
        """The events that are left, up to the end of the stream."""
        events = []
        while (event := self.next_event()) is not None:
            events.append(event)
        return events

    def close(self):
        self.response.close()
        self.client.close()


@contextmanager
def streaming(url, body, video_id):
    """A stream whose first event has come."""
    stream = Stream(url, body, video_id)
    try:
        assert stream.response.status_code == 200, stream.response.read()
        assert stream.next_event()
        yield stream
    finally:
        stream.close()
