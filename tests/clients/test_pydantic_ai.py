"""Pydantic AI: an agent's text, its stream, and structured output by the tool it forces, which is its default."""

import asyncio
from typing import Literal

import pytest
from conftest import KEY
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Shape(BaseModel):
    name: Literal["circle", "square", "triangle"]
    count: int


@pytest.fixture(scope="module")
def model(server):
    return OpenAIChatModel("nano", provider=OpenAIProvider(base_url=server.v1, api_key=KEY))


# White space is allowed between the tokens of JSON, and a model this small would go on with it.
SETTINGS = {"temperature": 0, "max_tokens": 160}


def test_agent_answers_and_shows_the_thinking(model):
    result = Agent(model, instructions="Answer briefly.").run_sync("What is shown?", model_settings=SETTINGS)
    assert result.output
    assert [part.part_kind for part in result.response.parts] == ["thinking", "text"]
    assert result.usage.output_tokens > 0


def test_conversation_goes_on_with_the_messages_of_the_first_run(model):
    agent = Agent(model)
    first = agent.run_sync("What is shown?", model_settings=SETTINGS)
    second = agent.run_sync("Why?", message_history=first.all_messages(), model_settings=SETTINGS)
    assert second.output
    assert second.usage.input_tokens > first.usage.input_tokens


def test_stream_says_the_same_as_a_run(model):
    async def outputs():
        agent = Agent(model)
        unary = await agent.run("What is shown?", model_settings=SETTINGS)
        async with agent.run_stream("What is shown?", model_settings=SETTINGS) as stream:
            return unary.output, await stream.get_output()

    unary, streamed = asyncio.run(outputs())
    assert unary == streamed != ""


def test_picture_is_read(model, picture):
    content = ["What is shown?", BinaryContent(picture, media_type="image/png")]
    assert Agent(model).run_sync(content, model_settings=SETTINGS).output


def test_structured_output_comes_as_a_call_of_the_forced_tool(model):
    result = Agent(model, output_type=Shape).run_sync("Which shape?", model_settings=SETTINGS)
    assert isinstance(result.output, Shape)
    assert "tool-call" in [part.part_kind for part in result.response.parts]


def test_structured_output_streams(model):
    async def output():
        async with Agent(model, output_type=Shape).run_stream("Which shape?", model_settings=SETTINGS) as stream:
            return await stream.get_output()

    assert isinstance(asyncio.run(output()), Shape)
