"""OpenAI's agents SDK: its chat model, its Responses model with a video as a file, streams and typed output."""

import asyncio
from typing import Literal

import agents
import openai
import pytest
from conftest import KEY
from pydantic import BaseModel

agents.set_tracing_disabled(True)
SETTINGS = agents.ModelSettings(temperature=0, max_tokens=160)


class Choice(BaseModel):
    letter: Literal["A", "B", "C", "D"]


@pytest.fixture(params=[agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
def model(server, request):
    client = openai.AsyncOpenAI(base_url=server.v1, api_key=KEY, max_retries=0)
    return request.param(model="nano", openai_client=client)


def about(question):
    """A file passes through both models; a part for videos the SDK does not have."""
    video = {"type": "input_file", "file_data": question.data_url(), "filename": question.clip.name}
    return [{"role": "user", "content": [video, {"type": "input_text", "text": question.text}]}]


def test_video_question_is_answered_right(model, question):
    agent = agents.Agent(name="viewer", model=model, model_settings=SETTINGS)
    result = agents.Runner.run_sync(agent, about(question))
    assert result.final_output.strip() == question.answer


def test_conversation_goes_on_with_the_items_of_the_first_run(model, question):
    agent = agents.Agent(name="viewer", instructions="Answer.", model=model, model_settings=SETTINGS)
    first = agents.Runner.run_sync(agent, about(question))
    again = first.to_input_list() + [{"role": "user", "content": "Why?"}]
    assert agents.Runner.run_sync(agent, again).final_output


def test_stream_says_the_same_as_a_run(model, question):
    agent = agents.Agent(name="viewer", model=model, model_settings=SETTINGS)

    async def streamed():
        result, deltas = agents.Runner.run_streamed(agent, about(question)), ""
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                deltas += event.data.delta
        return result.final_output, deltas

    output, deltas = asyncio.run(streamed())
    assert output == deltas and output.strip() == question.answer


def test_typed_output_is_a_json_schema(model, question):
    agent = agents.Agent(name="viewer", model=model, model_settings=SETTINGS, output_type=Choice)
    assert agents.Runner.run_sync(agent, about(question)).final_output.letter in "ABCD"
