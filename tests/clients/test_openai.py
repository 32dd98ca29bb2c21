"""openai-python: chat in both modes, models, error classes, the timeout, and the retry after a 429."""

import asyncio
import threading

import openai
import pytest
from conftest import KEY, serving


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)


def ask(client, question, **more):
    return client.chat.completions.create(model="nano", messages=question.messages(), temperature=0, **more)


def collect(stream):
    """Reasoning, content, finish reason and usage of a stream; reasoning must end before content begins."""
    reasoning, content, finish, usage = "", "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought = getattr(choice.delta, "reasoning_content", None) or ""
            assert not (thought and content), "thinking after the answer began"
            assert not (thought and choice.delta.content), "both in one chunk"
            reasoning += thought
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return reasoning, content, finish, usage


def test_every_demo_question_is_answered_right_after_thinking(client, each_question):
    reply = ask(client, each_question)
    [choice] = reply.choices
    assert choice.message.content.strip() == each_question.answer
    assert choice.message.reasoning_content
    assert choice.finish_reason == "stop"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert reply.model_extra["video"]["sampled_indices"]


def test_a_stream_says_the_same_as_a_unary_reply(client, question):
    unary = ask(client, question)
    stream = ask(client, question, stream=True, stream_options={"include_usage": True})
    reasoning, content, finish, usage = collect(stream)
    assert (reasoning, content) == (unary.choices[0].message.reasoning_content, unary.choices[0].message.content)
    assert finish == "stop"
    assert usage.completion_tokens == unary.usage.completion_tokens


def test_the_stream_helper_puts_the_reply_together(client, question):
    with client.chat.completions.stream(model="nano", messages=question.messages(), temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content.strip() == question.answer


def test_the_async_client_asks_several_at_once(server, question):
    async def answers():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=KEY) as client:
            asked = [
                client.chat.completions.create(model="nano", messages=question.messages(), seed=seed)
                for seed in (1, 1)
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*asked)]

    first, second = asyncio.run(answers())
    assert first == second


def test_frames_are_sampled_as_the_extra_body_says(client, question):
    kwargs = {"video": {"num_frames": 4}}
    reply = ask(client, question, extra_body={"media_io_kwargs": kwargs})
    assert len(reply.model_extra["video"]["sampled_indices"]) == 4


def test_models_are_listed_and_found(client):
    [model] = client.models.list().data
    assert model.id == "nano"
    assert client.models.retrieve("nano") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_have_the_classes_that_clients_catch(server, client, question):
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(openai.OpenAI(base_url=server.v1, api_key="another", max_retries=0), question)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, question, top_p=7)
    assert refused.value.param == "top_p" and refused.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, question, max_tokens=10_000_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="other", messages=question.messages())
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, question, extra_body={"no_such_field": 1})
    assert refused.value.param == "no_such_field"
    not_a_video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,bm90IGEgdmlkZW8="}}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": [not_a_video]}])
    assert refused.value.status_code == 415


LONG = {"model": "nano", "messages": [{"role": "user", "content": "Hello?"}], "extra_body": {"ignore_eos": True}}


def test_a_slow_reply_is_a_timeout_of_the_client(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**LONG, max_tokens=900)


def test_a_full_server_is_asked_again_after_its_retry_after():
    with serving("--max-running", "1", "--max-waiting", "0") as server:
        client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
        held = client.chat.completions.create(**LONG, max_tokens=900, stream=True)
        next(iter(held))
        hi = {"model": "nano", "messages": LONG["messages"], "max_tokens": 3}
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**hi)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        patient = client.with_options(max_retries=10).chat.completions.with_raw_response
        threading.Timer(0.5, held.close).start()
        reply = patient.create(**hi)
        assert reply.retries_taken >= 1
        assert reply.parse().usage.completion_tokens == 3
