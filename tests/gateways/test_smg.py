"""smg before several servers: affinity, crashes, drains, full queues, clients that leave, and what it does to a body."""

import sys
from contextlib import contextmanager

import httpx
from conftest import (
    CHAT, QUESTIONS, VIDEOS, Process, ask, free_ports, question, running, serving, streaming, until,
)

AFFINITY = ["--policy", "consistent_hashing", "--routing-key-headers", "x-video-id"]
# Which server answered, as smg tells it.
ANSWERED_BY = "x-smg-routed-worker-id"


class Smg(Process):
    def __init__(self, servers, *flags):
        port, metrics_port = free_ports(2)
        super().__init__("smg", port, [
            sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port),
            "--health-check-endpoint", "/ready", "--health-check-interval-secs", "1",
            "--health-failure-threshold", "1", "--health-success-threshold", "1",
            "--worker-urls", *(server.url for server in servers), *flags,
        ])

    def healthy(self):
        return httpx.get(self.url + "/readiness", timeout=5).json().get("healthy_workers")

    def until_healthy(self, number):
        until(f"smg counts {number} healthy servers", lambda: self.healthy() == number, 60)


@contextmanager
def smg_before(number, *flags, server_flags=()):
    with serving(number, *server_flags) as servers, running(Smg(servers, *flags)) as smg:
        smg.until_healthy(number)
        yield smg, servers


def ask_everything(smg):
    """Three questions about each of five videos; returns which server answered for each video."""
    servers = {clip.stem: set() for clip in VIDEOS}
    for text in QUESTIONS:
        for clip in VIDEOS:
            reply = ask(smg.url, question(text, clip), clip.stem)
            assert reply.status_code == 200, reply.text
            servers[clip.stem].add(reply.headers[ANSWERED_BY])
    return servers


def owner(servers, url):
    [server] = [server for server in servers if server.url == url]
    return server


def test_consistent_hashing_decodes_each_video_once():
    with smg_before(3, *AFFINITY) as (smg, servers):
        answered_by = ask_everything(smg)
        assert all(len(urls) == 1 for urls in answered_by.values()), answered_by
        assert sum(server.decodes() for server in servers) == len(VIDEOS) == 5


def test_round_robin_decodes_each_video_on_every_server():
    with smg_before(3, "--policy", "round_robin") as (smg, servers):
        ask_everything(smg)
        assert [server.decodes() for server in servers] == [5, 5, 5]


def test_killed_server_loses_its_videos_to_the_others_and_no_request():
    with smg_before(3, *AFFINITY) as (smg, servers):
        before = ask_everything(smg)
        [lost] = before[VIDEOS[0].stem]
        owner(servers, lost).kill()
        after = ask_everything(smg)
        for video, urls in after.items():
            assert lost not in urls
            assert urls == before[video] or before[video] == {lost}, (video, before, after)


def test_terminated_server_ends_its_streams_and_others_take_its_videos():
    with smg_before(3, *AFFINITY, server_flags=["--drain-delay", "5"]) as (smg, servers):
        clip = VIDEOS[0]
        body = question("Count.", clip, ignore_eos=True, max_tokens=400)
        with streaming(smg.url, body, clip.stem) as stream:
            leaving = owner(servers, stream.response.headers[ANSWERED_BY])
            until("the stream runs", lambda: leaving.running() == 1)
            leaving.terminate()
            until("/ready says no", lambda: httpx.get(leaving.url + "/ready").status_code == 503)
            smg.until_healthy(2)
            reply = ask(smg.url, question("What is shown?", clip), clip.stem)
            assert reply.status_code == 200 and reply.headers[ANSWERED_BY] != leaving.url
            assert stream.rest()[-1] == "[DONE]"
        assert leaving.process.wait(timeout=60) == 0


def test_full_server_is_spared_and_a_429_keeps_its_retry_after():
    body = question("Count.", ignore_eos=True, max_tokens=900)
    short = question("Hello?", max_tokens=2)
    full = ["--max-running", "1", "--max-waiting", "0"]
    # Two tries, soon after each other: the streams that fill the servers last a second or two.
    tries = ["--retry-max-retries", "2", "--retry-initial-backoff-ms", "10"]
    with smg_before(2, *AFFINITY, *tries, server_flags=full) as (smg, servers):
        with streaming(smg.url, body, "a") as first:
            reply = ask(smg.url, short, "a")
            assert reply.status_code == 200, "a retry finds the other server"
            assert reply.headers[ANSWERED_BY] != first.response.headers[ANSWERED_BY]
            with streaming(smg.url, body, "a"):
                until("both servers are full", lambda: [server.running() for server in servers] == [1, 1])
                reply = ask(smg.url, short, "a")
                assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
                assert int(reply.headers["retry-after"]) >= 1


def test_disconnecting_client_frees_the_server_behind_the_gateway():
    with smg_before(1, *AFFINITY) as (smg, [server]):
        body = question("Count.", VIDEOS[0], ignore_eos=True, max_tokens=900)
        with streaming(smg.url, body, "a"):
            until("the stream runs", lambda: server.running() == 1)
        until("nothing runs", lambda: server.running() == 0)
        assert server.metric('tinyllava_request_seconds_count{outcome="client_left"}') == 1


def test_media_io_kwargs_arrive_and_knobs_in_video_url_do_not():
    with smg_before(1) as (smg, [server]):
        def sampled(body):
            reply = ask(smg.url, body)
            assert reply.status_code == 200, reply.text
            return len(reply.json()["video"]["sampled_indices"])

        assert sampled(question("Hello?", VIDEOS[0], media_io_kwargs={"video": {"num_frames": 4}})) == 4
        body = question("Hello?", VIDEOS[0])
        body["messages"][0]["content"][0]["video_url"]["num_frames"] = 4
        assert sampled(body) == 16
        assert ask(server.url, body).json()["video"]["num_frames"] == 4, "the server itself knows the knob"


def test_only_json_passes_and_only_the_generating_endpoints():
    with smg_before(1) as (smg, _):
        form = {"files": {"video": VIDEOS[0].read_bytes()}, "data": {"request": '{"model": "nano", "messages": []}'}}
        assert httpx.post(smg.url + CHAT, **form).status_code == 400
        assert httpx.post(smg.url + "/v1/files", files={"file": b"x"}, data={"purpose": "vision"}).status_code == 404
        for path, body in [
            ("/v1/completions", {"model": "nano", "prompt": "Hello", "max_tokens": 2}),
            ("/v1/responses", {"model": "nano", "input": "Hello", "max_output_tokens": 2}),
        ]:
            reply = httpx.post(smg.url + path, json=body, timeout=60)
            assert reply.status_code == 200, reply.text
