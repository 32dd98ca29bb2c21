"""NVIDIA Dynamo's KV indexer, a reader of KV events written by others: blocks stored, replayed and removed."""

import os
import sys

import httpx
import pytest
from conftest import VIDEOS, Process, ask, free_ports, question, running, serving, until

BLOCK = 16


def random_text():
    """Ten blocks and more that no other text begins with."""
    return " ".join(os.urandom(3).hex() for _ in range(20))


def ask_server(server, text, clip=None):
    reply = ask(server.url, question(text, clip, max_tokens=1))
    assert reply.status_code == 200, reply.text


class Indexer(Process):
    def __init__(self):
        [port] = free_ports(1)
        super().__init__("indexer", port, [
            sys.executable, "-m", "dynamo.indexer", "--port", str(port), "--block-size", str(BLOCK),
        ])

    def register(self, number, server):
        httpx.post(self.url + "/register", json={
            "instance_id": number, "endpoint": server.events, "replay_endpoint": server.replay,
            "model_name": "nano", "block_size": BLOCK,
        }).raise_for_status()

    def cached_tokens(self, server, text):
        """For each instance, how many of the prompt's tokens it has cached."""
        body = {"model": "nano", "messages": question(text)["messages"]}
        tokens = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
        scores = httpx.post(self.url + "/query", json={"token_ids": tokens, "model_name": "nano"}).json()["scores"]
        cached = {int(number): ranks["0"] for number, ranks in scores.items()}
        return [cached.get(number, 0) for number in (0, 1)]


@pytest.mark.parametrize("form", ["map", "array"])
def test_indexer_knows_what_each_server_has_cached(form):
    # Little cache, so that prompts push one another out.
    flags = ["--kv-cache-mib", "1", "--kv-events-format", form]
    with serving(2, *flags, kv_events=True) as servers, running(Indexer()) as indexer:
        early, late = random_text(), random_text()
        # No text matches blocks of a video; the indexer must go on reading the others.
        ask_server(servers[0], "What is shown?", VIDEOS[0])
        ask_server(servers[0], early)
        indexer.until_ok("/health")
        for number, server in enumerate(servers):
            indexer.register(number, server)

        def sees(text, number):
            """All of the text's blocks on one server, and on the other no more than the template's."""
            cached = indexer.cached_tokens(servers[0], text)
            return cached[number] >= 10 * BLOCK and cached[1 - number] <= BLOCK

        def hears(number):
            fresh = random_text()
            ask_server(servers[number], fresh)
            return sees(fresh, number)

        # A subscription takes a moment, and what comes before it is heard by replay.
        for number in (0, 1):
            until(f"the indexer hears server {number}", lambda: hears(number))
        ask_server(servers[1], late)
        until("stored blocks are known", lambda: sees(late, 1))
        assert sees(early, 0), "blocks from before the indexer are known by replay"

        def is_removed():
            ask_server(servers[1], random_text())
            return indexer.cached_tokens(servers[0], late)[1] <= BLOCK

        until("removed blocks are forgotten", is_removed)
