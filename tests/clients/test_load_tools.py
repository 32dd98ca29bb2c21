"""Bodies as guidellm writes them (vllm-project/guidellm, backends/openai), read as it reads the stream."""

import json
import urllib.request

import pytest
from conftest import KEY

TOKENS = 24
STREAMED = {
    "model": "nano", "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": None, "ignore_eos": True,
}


def chunks(server, path, body):
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(server.v1 + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line.decode().strip() for line in response]
    events = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def check_usage(chunks):
    """Every chunk counts the tokens so far, and the last counts all that were asked for."""
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == TOKENS
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_with_a_video_counts_tokens_in_every_chunk(server, question):
    [message] = question.messages()
    message["content"].reverse()
    body = STREAMED | {"max_completion_tokens": TOKENS, "messages": [message]}
    received = chunks(server, "/chat/completions", body)
    check_usage(received)
    assert received[-1]["choices"] == []
    assert received[-1]["usage"]["prompt_tokens_details"]["video_tokens"] > 0


def test_completion_counts_tokens_in_every_chunk(server):
    received = chunks(server, "/completions", STREAMED | {"max_tokens": TOKENS, "prompt": "A video is"})
    check_usage(received)


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_without_the_option_only_the_last_chunk_counts(server, path):
    prompt = {"prompt": "A video is"} if path == "/completions" else {"messages": [{"role": "user", "content": "Hello?"}]}
    body = STREAMED | prompt | {"max_tokens": TOKENS, "stream_options": {"include_usage": True}}
    *before, last = chunks(server, path, body)
    assert all(chunk.get("usage") is None for chunk in before)
    assert last["usage"]["completion_tokens"] == TOKENS
