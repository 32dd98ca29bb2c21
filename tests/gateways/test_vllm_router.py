"""vllm-router, which writes each body anew with its own defaults, and its kv_aware policy, which reads KV events."""

import json
import os
import re

import httpx
import pytest
from conftest import DEMO, PROGRAMS, VIDEOS, Process, ask, free_ports, question, running, serving, until

BLOCK = 16


class VllmRouter(Process):
    def __init__(self, servers, *flags):
        port, metrics_port = free_ports(2)
        super().__init__("vllm-router", port, [
            PROGRAMS / "vllm-router", "--host", "127.0.0.1", "--port", str(port), "--log-level", "debug",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port),
            "--health-check-endpoint", "/ready", "--worker-urls", *(server.url for server in servers), *flags,
        ])

    def has_read(self, server):
        """Its log names the newest batch of the server's events."""
        published = int(server.metric('tinyllava_kv_event_batches_total{outcome="published"}'))
        log = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return re.search(rf"sequence advanced source={server.url} rank=0 seq={published - 1}\b", log)


def kv_aware(servers):
    flags = ["--policy", "kv_aware", "--kv-event-model", "nano", "--kv-event-block-size", str(BLOCK)]
    for server in servers:
        flags += ["--kv-event-source", f"{server.url}={server.events}"]
        flags += ["--kv-event-replay-source", f"{server.url}={server.replay}"]
    return flags


def random_prompt():
    return question(" ".join(os.urandom(3).hex() for _ in range(20)), max_tokens=1)


def cached_tokens(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def router():
    with serving(1) as servers, running(VllmRouter(servers, "--policy", "round_robin")) as router:
        router.until_ok("/readiness")
        yield router


def test_video_question_is_answered_right(router):
    entry = json.loads((DEMO / "questions.json").read_text())[0]
    reply = ask(router.url, question(entry["question"], DEMO / entry["video"]))
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].strip() == entry["answer"]


def test_stream_ends_with_done(router):
    body = question("What is shown?", VIDEOS[0], stream=True, stream_options={"include_usage": True})
    reply = ask(router.url, body)
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] > 0


def test_completions_and_responses_pass_too(router):
    for path, body in [
        ("/v1/completions", {"model": "nano", "prompt": "Hello", "max_tokens": 2}),
        ("/v1/responses", {"model": "nano", "input": "Hello", "max_output_tokens": 2}),
    ]:
        reply = httpx.post(router.url + path, json=body, timeout=60)
        assert reply.status_code == 200, reply.text


def test_knobs_of_video_url_and_unknown_fields_arrive(router):
    body = question("Hello?", VIDEOS[0])
    body["messages"][0]["content"][0]["video_url"]["num_frames"] = 4
    reply = ask(router.url, body)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["video"]["sampled_indices"]) == 4
    reply = ask(router.url, question("Hello?", no_such_field=1))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "no_such_field")


def test_kv_aware_sends_a_prompt_to_the_server_that_has_it():
    # The router reads only messages with an empty topic.
    with serving(2, "--kv-events-topic", "", kv_events=True) as servers:
        prompts = [random_prompt() for _ in range(6)]

        def warm(numbers):
            for number in numbers:
                cached_tokens(ask(servers[number % 2].url, prompts[number]))

        # The router cannot match blocks of a video; it must go on reading the others.
        for server in servers:
            cached_tokens(ask(server.url, question("What is shown?", VIDEOS[0])))
        # Half of the prompts come before the router, which hears of them by replay.
        warm(range(3))
        with running(VllmRouter(servers, *kv_aware(servers))) as router:
            router.until_ok("/readiness")

            def has_heard_of_both():
                for server in servers:
                    cached_tokens(ask(server.url, random_prompt()))
                return all(router.has_read(server) for server in servers)

            until("the router reads events of both servers", has_heard_of_both)
            warm(range(3, 6))
            until("the router has read all events", lambda: all(router.has_read(server) for server in servers))
            found = [cached_tokens(ask(router.url, prompt)) for prompt in prompts]
        assert min(found) >= 10 * BLOCK, found
