"""A small HTTP client that sees what a browser's would hide: when each read came, and whether the reply was whole."""

import asyncio
import json
import time
import uuid

CHAT = "/v1/chat/completions"
KEY = "key-of-the-tests"


class Reply:
    """One reply; `whole` only when its framing said that it is over."""

    def __init__(self, request_id):
        self.request_id = request_id
        self.status, self.headers, self.body = None, {}, b""
        self.whole, self.reads = False, []

    def json(self):
        return json.loads(self.body)

    def events(self):
        lines = self.body.decode().split("\n\n")
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def is_complete_stream(self):
        """As a client of OpenAI's API knows it: a reason to finish, and [DONE] as the last event."""
        events = self.events()
        if not self.whole or not events or events[-1] != "[DONE]":
            return False
        choices = [json.loads(event)["choices"] for event in events[:-1]]
        return any(choice[0].get("finish_reason") for choice in choices if choice)

    def says_error(self):
        return any("error" in json.loads(event) for event in self.events() if event != "[DONE]")

    def __repr__(self):
        return f"{self.request_id}: {self.status}, {'whole' if self.whole else 'cut off'}, {self.body[-300:]}"


async def send(port, method, path, body=b"", headers=None, on_read=None):
    """One request on a connection of its own."""
    reply = Reply((headers or {}).get("x-request-id") or f"test-{uuid.uuid4()}")
    headers = {
        "host": "balancer", "x-request-id": reply.request_id, "authorization": f"Bearer {KEY}",
        "content-length": str(len(body)), "content-type": "application/json", "connection": "close",
    } | (headers or {})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        await receive(reader, reply, on_read)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # `whole` says it.
    finally:
        writer.close()
    return reply


async def receive(reader, reply, on_read):
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    reply.status = int(head[0].split()[1])
    reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if "content-length" in reply.headers:
        reply.body = await reader.readexactly(int(reply.headers["content-length"]))
        reply.whole = True
    while not reply.whole and reply.headers.get("transfer-encoding") == "chunked":
        size = int(await reader.readuntil(b"\r\n"), 16)
        reply.body += (await reader.readexactly(size + 2))[:size]
        reply.reads.append(time.monotonic())
        reply.whole = size == 0
        if on_read:
            on_read(reply)


def question(video, **more):
    """The body of a request about a video, as base64."""
    import base64

    url = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    return json.dumps({"model": "nano", "messages": [{"role": "user", "content": content}]} | more).encode()


async def ask(port, body, video_id=None, on_read=None):
    return await send(port, "POST", CHAT, body, {"x-video-id": video_id}, on_read)
