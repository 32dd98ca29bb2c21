"""Instructor: typed answers about a video, by a forced tool (its default) and by a JSON schema."""

from typing import Literal

import instructor
import openai
import pytest
from conftest import KEY
from pydantic import BaseModel


class Choice(BaseModel):
    letter: Literal["A", "B", "C", "D"]


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_answer_has_the_type_that_was_asked_for(server, question, mode):
    client = instructor.from_openai(openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0), mode=mode)
    choice, completion = client.chat.completions.create_with_completion(
        model="nano", messages=question.messages(), response_model=Choice, max_retries=0, temperature=0,
        # White space is allowed in JSON, and a model this small would go on with it.
        max_tokens=160,
    )
    assert choice.letter in "ABCD"
    message = completion.choices[0].message
    assert bool(message.tool_calls) == (mode is instructor.Mode.TOOLS)
