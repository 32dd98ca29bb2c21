"""Three servers behind the shipped configurations of HAProxy and nginx: restarts, crashes, hangs, streams, affinity."""

import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
import unittest
from pathlib import Path

from client import CHAT, ask, question, send
from processes import ROOT, HAProxy, Nginx, Server, free_ports, until

CLIENTS = 64
TOKENS = 120
CLIPS = sorted((ROOT / "models/nano/demo").glob("*.mp4"))
# Enough that the first stream still runs when the last one has begun.
LONG = 6 * TOKENS


def stream_body(number, tokens=TOKENS):
    return question(CLIPS[number % len(CLIPS)].read_bytes(), stream=True, ignore_eos=True, max_tokens=tokens)


def video_id(number):
    """Half of the clients say which video they ask about."""
    return CLIPS[number % len(CLIPS)].stem if number % 2 else None


class Cases:
    """What must hold behind either balancer."""

    balancer_class = None

    async def asyncSetUp(self):
        # It warns of every slow step, and this machine is busy.
        asyncio.get_running_loop().set_debug(False)
        self.balancer = None
        self.addAsyncCleanup(self.end_all)
        directory = Path(tempfile.mkdtemp(prefix="servers-"))
        self.servers = [Server(port, directory) for port in free_ports(3)]
        for server in self.servers:
            server.start()
        for server in self.servers:
            await server.until_ready()
        self.balancer = self.balancer_class(self.servers)
        await self.balancer.start()
        await self.until_all_are_used()

    async def end_all(self):
        for each in [self.balancer, *self.servers]:
            if each and each.process:
                each.process.kill()
                each.process.wait()

    async def until_all_are_used(self):
        """The balancer knows that all servers are there."""
        body = question(CLIPS[0].read_bytes(), max_tokens=1)
        wanted = set(range(len(self.servers)))

        async def all_used():
            replies = await asyncio.gather(*(ask(self.balancer.port, body) for _ in range(12)))
            self.assertEqual({reply.status for reply in replies}, {200})
            return set(self.servers_of(replies)) == wanted

        await until("requests go to all servers", all_used)

    def servers_of(self, replies):
        """Index of the server that finished each, by their logs; None where none did."""
        finished = {each: i for i, server in enumerate(self.servers) for each in server.finished()}
        return [finished.get(reply.request_id) for reply in replies]

    def say(self, text):
        print(f"{self.balancer.NAME}: {text}", flush=True)

    async def test_everything(self):
        """One after the other, on the same processes: each part leaves all servers running."""
        for part in [
            self.passes_requests_on, self.streams_token_by_token, self.keeps_a_video_on_its_server,
            self.loses_nothing_in_a_rolling_restart, self.loses_only_the_streams_of_a_killed_server,
            self.ejects_a_server_that_hangs, self.says_that_no_server_is_ready,
        ]:
            started = time.monotonic()
            with self.subTest(part.__name__):
                await part()
            self.say(f"{part.__name__.replace('_', ' ')} ({time.monotonic() - started:.0f} s)")

    async def passes_requests_on(self):
        port = self.balancer.port
        reply = await send(port, "GET", "/v1/models", headers={"x-request-id": "mine"})
        self.assertEqual((reply.status, reply.headers["x-request-id"]), (200, "mine"))
        reply = await send(port, "GET", "/v1/models", headers={"x-request-id": None})
        self.assertGreaterEqual(len(reply.headers["x-request-id"]), 32)
        reply = await send(port, "GET", "/v1/models", headers={"authorization": None})
        self.assertEqual((reply.status, reply.json()["error"]["code"]), (401, "invalid_api_key"))
        reply = await send(port, "GET", "/metrics")
        self.assertEqual((reply.status, reply.json()["error"]["code"]), (404, "not_found"))
        # 20 MB of a box that players skip: far more than a balancer's buffers.
        padding = 20_000_000
        video = CLIPS[0].read_bytes() + padding.to_bytes(4, "big") + b"free" + bytes(padding - 8)
        reply = await ask(port, question(video, max_tokens=1))
        self.assertEqual(reply.status, 200, reply)

    async def streams_token_by_token(self):
        for name, port in [("direct", self.servers[0].port), ("through the balancer", self.balancer.port)]:
            reply = await ask(port, stream_body(0))
            self.assertTrue(reply.is_complete_stream(), reply)
            self.assertGreater(len(reply.reads), TOKENS / 2, "events came in bunches")
            gaps = [1000 * (b - a) for a, b in zip(reply.reads, reply.reads[1:])]
            apart = sum(gap > 0.05 for gap in gaps)
            # A client that is late finds several at once: what counts is that they did not all come together.
            self.assertGreater(apart, 5, "events came all at once")
            median, longest = statistics.median(gaps), max(gaps)
            self.say(f"{name}: {len(gaps)} gaps between reads, median {median:.2f} ms, longest {longest:.1f} ms")

    async def keeps_a_video_on_its_server(self):
        ids = [f"video-{number}" for number in range(12)]
        body = question(CLIPS[1].read_bytes(), max_tokens=1)

        async def places():
            replies = [await ask(self.balancer.port, body, each) for each in ids]
            self.assertEqual({reply.status for reply in replies}, {200})
            return dict(zip(ids, self.servers_of(replies)))

        before = await places()
        self.assertGreater(len(set(before.values())), 1, "all videos are on one server")
        self.assertEqual(await places(), before)
        # The second question about a video finds its tokens computed.
        reply = await ask(self.balancer.port, body, ids[0])
        self.assertGreater(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0)
        away = before[ids[0]]
        await self.servers[away].stop()
        during = await places()
        for each in ids:
            if before[each] == away:
                self.assertNotEqual(during[each], away)
            else:
                self.assertEqual(during[each], before[each], "a video moved although its server is there")
        self.assertEqual(await places(), during)
        self.servers[away].start()
        await self.servers[away].until_ready()

        async def as_before():
            return await places() == before

        await until("its videos come back", as_before)

    async def loses_nothing_in_a_rolling_restart(self):
        over, replies = asyncio.Event(), []

        async def client(number):
            body = stream_body(number)
            while not over.is_set():
                replies.append(await ask(self.balancer.port, body, video_id(number)))

        clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        for server in self.servers:
            await server.stop()
            server.start()
            await server.until_ready()
            await self.until_all_are_used()
        over.set()
        await asyncio.gather(*clients)
        lost = [reply for reply in replies if reply.status != 200 or not reply.is_complete_stream()]
        self.assertEqual(lost, [])
        served = [self.servers_of(replies).count(i) for i in range(3)]
        self.say(f"{len(replies)} streams of {TOKENS} tokens during three restarts, by server {served}, none lost")

    async def loses_only_the_streams_of_a_killed_server(self):
        started, all_started = set(), asyncio.Event()

        def on_read(reply):
            started.add(reply.request_id)
            if len(started) == CLIENTS:
                all_started.set()

        streams = [
            asyncio.create_task(ask(self.balancer.port, stream_body(number, LONG), video_id(number), on_read))
            for number in range(CLIENTS)
        ]
        await asyncio.wait_for(all_started.wait(), 60)
        killed = self.servers[1]
        killed.signal(signal.SIGKILL)
        killed.process.wait()
        replies = await asyncio.gather(*streams)
        broken = [reply for reply in replies if not reply.is_complete_stream()]
        self.assertGreater(len(broken), 0, "no stream was on the killed server")
        for reply, server in zip(replies, self.servers_of(replies)):
            self.assertEqual(reply in broken, server is None, reply)
        for reply in broken:
            # The client can tell: the connection ends within the reply, or an event says it.
            self.assertTrue(not reply.whole or reply.says_error(), reply)
            self.assertNotIn("[DONE]", reply.events())
        self.say(f"{len(broken)} of {CLIENTS} streams were on the killed server and broke off, the others are whole")
        # It is left out, and comes back when it is there again.
        body = question(CLIPS[0].read_bytes(), max_tokens=1)
        replies = await asyncio.gather(*(ask(self.balancer.port, body) for _ in range(12)))
        self.assertEqual({reply.status for reply in replies}, {200}, replies)
        killed.start()
        await killed.until_ready()
        await self.until_all_are_used()

    async def ejects_a_server_that_hangs(self):
        """Only who asks servers for their health can know."""
        if not isinstance(self.balancer, HAProxy):
            return
        hanging = self.servers[2]
        running = asyncio.create_task(ask(hanging.port, stream_body(0)))
        await asyncio.sleep(0.2)
        hanging.signal(signal.SIGSTOP)

        async def is_ejected():
            return (await self.balancer.states())["s3"].startswith("DOWN")

        await until("the server is ejected", is_ejected)
        body = question(CLIPS[0].read_bytes(), max_tokens=1)
        replies = await asyncio.gather(*(ask(self.balancer.port, body, video_id(number)) for number in range(24)))
        self.assertEqual({reply.status for reply in replies}, {200})
        self.assertNotIn(2, self.servers_of(replies))
        hanging.signal(signal.SIGCONT)
        self.assertTrue((await running).is_complete_stream(), "a pause is no end")
        await self.until_all_are_used()

    async def says_that_no_server_is_ready(self):
        await asyncio.gather(*(server.stop() for server in self.servers))
        reply = await ask(self.balancer.port, stream_body(0))
        self.assertEqual((reply.status, reply.json()["error"]["code"]), (503, "no_server_ready"))
        self.assertEqual(reply.headers["retry-after"], "2")


class BehindHAProxy(Cases, unittest.IsolatedAsyncioTestCase):
    balancer_class = HAProxy


class BehindNginx(Cases, unittest.IsolatedAsyncioTestCase):
    balancer_class = Nginx


if __name__ == "__main__":
    unittest.main(verbosity=2)
