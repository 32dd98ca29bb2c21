"""LiteLLM: its OpenAI-compatible provider, in both modes, with the thinking where it puts everyone's."""

import litellm
import pytest
from conftest import KEY


def ask(server, question, messages=None, **more):
    return litellm.completion(
        model="openai/nano",
        api_base=server.v1,
        api_key=KEY,
        messages=messages or question.messages(),
        temperature=0,
        num_retries=0,
        **more,
    )


def test_a_unary_reply_has_the_thinking_and_the_answer(server, question):
    message = ask(server, question).choices[0].message
    assert message.content.strip() == question.answer
    assert message.reasoning_content


def test_a_stream_brings_the_thinking_then_the_answer(server, question):
    reasoning, content = "", ""
    for chunk in ask(server, question, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
    message = ask(server, question).choices[0].message
    assert (reasoning, content) == (message.reasoning_content, message.content)


def test_vllm_s_provider_works_too(server, question):
    reply = litellm.completion(
        model="hosted_vllm/nano", api_base=server.v1, api_key=KEY, messages=question.messages(), temperature=0
    )
    assert reply.choices[0].message.content.strip() == question.answer


def test_errors_have_the_classes_that_clients_catch(server, question):
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(
            model="openai/nano", api_base=server.v1, api_key="another", messages=question.messages(), num_retries=0
        )
    with pytest.raises(litellm.BadRequestError):
        ask(server, question, top_p=7)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(
            model="openai/other", api_base=server.v1, api_key=KEY, messages=question.messages(), num_retries=0
        )


def test_conversation_goes_on_with_the_message_that_was_received(server, question):
    """LiteLLM's message has fields of its own: provider_specific_fields, and many that are null."""
    first = ask(server, question).choices[0].message
    echoed = first.model_dump()
    assert echoed["provider_specific_fields"] is not None
    messages = [*question.messages(), echoed, {"role": "user", "content": "Why?"}]
    reply = ask(server, question, messages=messages)
    assert reply.choices[0].message.content
    # The message object itself is what most programs append.
    again = ask(server, question, messages=[*question.messages(), first, {"role": "user", "content": "Why?"}])
    assert again.choices[0].message.content == reply.choices[0].message.content


def test_parts_with_cache_control_are_read(server, question):
    messages = question.messages()
    messages[0]["content"][-1]["cache_control"] = {"type": "ephemeral"}
    assert ask(server, question, messages=messages).choices[0].message.content.strip() == question.answer
