"""KV events as a router hears them: libzmq and vLLM's own struct definitions, against a server with a small cache."""

import json
import socket
import time
import urllib.request
from typing import Any

import msgspec
import pytest
import zmq

from conftest import serving

BLOCK = 16


TOPIC = b"kv@pod-1@nano"


# The structs as vLLM declares them, so that this test decodes what its subscribers decode.
# Fields of the cache group came with the maps.
def structs(form):
    positional = {"array_like": form == "array", "omit_defaults": True}

    class Event(msgspec.Struct, tag=True, **positional):
        pass

    class BlockStored(Event):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[list[tuple[Any, ...]] | None] | None = None
        group_idx: int | None = None
        kv_cache_spec_kind: str | None = None
        kv_cache_spec_sliding_window: int | None = None

    class BlockRemoved(Event):
        block_hashes: list[int]
        medium: str | None
        group_idx: int | None = None

    class AllBlocksCleared(Event):
        pass

    class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
        ts: float
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]
        data_parallel_rank: int | None = None

    return Batch


class Router:
    """Knows what the events say."""

    def __init__(self, socket, form="map"):
        self.socket, self.form = socket, form
        self.decode = msgspec.msgpack.Decoder(structs(form)).decode
        self.numbers, self.known, self.stored, self.removed = [], {}, [], []

    def hear(self, wait_ms=5000):
        """One message; False when none comes."""
        if not self.socket.poll(wait_ms):
            return False
        topic, number, payload = self.socket.recv_multipart()
        assert topic == TOPIC
        self.numbers.append(int.from_bytes(number, "big"))
        self.take(self.decode(payload))
        return True

    def take(self, batch):
        assert abs(batch.ts - time.time()) < 600 and batch.data_parallel_rank == 0
        cache = ("GPU", 0) if self.form == "map" else (None, None)
        for event in batch.events:
            match type(event).__name__:
                case "BlockStored":
                    assert (event.medium, event.group_idx) == cache
                    assert event.block_size == BLOCK
                    assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                    for i, name in enumerate(event.block_hashes):
                        assert name not in self.known, "stored twice"
                        self.known[name] = event.token_ids[i * BLOCK:(i + 1) * BLOCK]
                    self.stored.append(event)
                case "BlockRemoved":
                    assert (event.medium, event.group_idx) == cache
                    for name in event.block_hashes:
                        # Who came late has not heard of all blocks.
                        assert self.known.pop(name, None) or self.numbers[0] > 0, "removed, but never stored"
                    self.removed.append(event)
                case "AllBlocksCleared":
                    self.known.clear()

    def hear_all(self):
        while self.hear(500):
            pass


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def post(server, path, body):
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def complete(server, prompt, max_tokens=1):
    return post(server, "/v1/completions", {"model": "nano", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True})


@pytest.fixture
def subscriber():
    context = zmq.Context()
    yield context.socket(zmq.SUB)
    context.destroy(linger=0)


# Of two engines it hears as of one.
@pytest.mark.parametrize(("devices", "form"), [("cpu", "map"), ("cpu,cpu", "map"), ("cpu", "array")])
def test_a_router_hears_what_is_cached_and_what_is_not_any_more(subscriber, devices, form):
    router = Router(subscriber, form)
    port, replay = free_port(), free_port()
    flags = ["--devices", devices, "--kv-events-format", form]
    flags += ["--kv-events-endpoint", f"tcp://*:{port}", "--kv-events-topic", "kv@pod-1@nano"]
    # One MiB of cache: prompts push one another out.
    flags += ["--kv-events-replay-endpoint", f"tcp://*:{replay}", "--kv-cache-mib", "1"]
    with serving(*flags) as server:
        router.socket.subscribe(b"kv@")
        router.socket.connect(f"tcp://127.0.0.1:{port}")
        # A subscriber hears what comes after its subscription has arrived.
        prompts = iter(range(1000))
        while not router.hear(100):
            complete(server, [1 + next(prompts) % 700] * 40)
        router.hear_all()

        # Long enough to be sent where it is known.
        text = list(range(100, 100 + 20 * BLOCK + 5))
        before = len(router.stored)
        complete(server, text, max_tokens=BLOCK)
        router.hear_all()
        prefill, *later = router.stored[before:]
        assert prefill.parent_block_hash is None and prefill.token_ids == text[:20 * BLOCK]
        assert later[0].parent_block_hash == prefill.block_hashes[-1], "the completion goes on where the prompt ended"
        assert later[0].token_ids[:5] == text[20 * BLOCK:]

        before = len(router.stored)
        again = complete(server, text)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 * BLOCK
        router.hear_all()
        assert router.stored[before:] == [], "what is cached is not stored again"

        while not router.removed:
            complete(server, [1 + next(prompts) % 700] * 400)
            router.hear_all()
        assert router.numbers == list(range(router.numbers[0], router.numbers[0] + len(router.numbers)))
        replayed_from_the_start(router, replay)


def replayed_from_the_start(router, port):
    """Who asks for everything from the first batch on knows the same; answers name the topic, as live messages do."""
    late = Router(router.socket.context.socket(zmq.DEALER), router.form)
    topic = [TOPIC] if router.form == "map" else []
    late.socket.connect(f"tcp://127.0.0.1:{port}")
    late.socket.send_multipart([b"", (0).to_bytes(8, "big")])
    while True:
        assert late.socket.poll(5000)
        *before, number, payload = late.socket.recv_multipart()
        if int.from_bytes(number, "big", signed=True) == -1:
            assert (before, payload) == ([b""] * (1 + len(topic)), b"")
            break
        assert before == [b"", *topic]
        late.numbers.append(int.from_bytes(number, "big"))
        late.take(late.decode(payload))
    late.socket.close(linger=0)
    assert late.numbers == list(range(router.numbers[-1] + 1))
    assert late.removed and late.known.keys() >= router.known.keys()


def test_visual_tokens_carry_the_name_of_their_video(subscriber, question):
    router = Router(subscriber)
    port = free_port()
    # This time the router listens, and the server connects.
    router.socket.subscribe(b"kv@")
    router.socket.bind(f"tcp://127.0.0.1:{port}")
    with serving("--kv-events-endpoint", f"tcp://127.0.0.1:{port}", "--kv-events-topic", "kv@pod-1@nano") as server:
        assert router.hear(10_000) and router.numbers == [0]
        post(server, "/v1/chat/completions", {"model": "nano", "messages": question.messages(), "max_tokens": 1})
        assert router.hear()
        router.hear_all()
    visual = 2**32 - 1
    tokens = [token for event in router.stored for token in event.token_ids]
    keys = [keys for event in router.stored for keys in event.extra_keys or [None] * len(event.block_hashes)]
    assert visual in tokens and tokens[0] != visual
    for block, key in zip((tokens[i:i + BLOCK] for i in range(0, len(tokens), BLOCK)), keys, strict=True):
        assert (key is not None) == (visual in block)
    named = [key[0] for key in keys if key]
    assert len({name for name, _ in named}) == 1 and len(named[0][0]) == 64
    first = tokens.index(visual)
    blocks = [i for i, key in enumerate(keys) if key]
    assert [offset for _, offset in named] == [first - BLOCK * i for i in blocks]
