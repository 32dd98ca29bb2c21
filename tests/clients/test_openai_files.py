"""openai-python: files that are uploaded once and named by their ids, and the Responses API."""

import openai
import pytest
from conftest import KEY


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)


@pytest.fixture
def uploaded(client, question):
    with question.clip.open("rb") as clip:
        file = client.files.create(file=clip, purpose="user_data")
    yield file
    client.files.delete(file.id)


def chat_about(client, question, file_id):
    content = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": question.text}]
    return client.chat.completions.create(
        model="nano", temperature=0, messages=[{"role": "user", "content": content}]
    )


def input_about(question, file_id):
    content = [{"type": "input_file", "file_id": file_id}, {"type": "input_text", "text": question.text}]
    return [{"role": "user", "content": content}]


def test_an_uploaded_clip_is_listed_read_back_and_asked_about(client, question, uploaded):
    assert uploaded.filename == question.clip.name and uploaded.bytes == question.clip.stat().st_size
    assert uploaded.id in [file.id for file in client.files.list()]
    assert client.files.retrieve(uploaded.id) == uploaded
    assert client.files.content(uploaded.id).read() == question.clip.read_bytes()
    for _ in range(2):
        assert chat_about(client, question, uploaded.id).choices[0].message.content.strip() == question.answer


def test_a_deleted_file_is_gone(client, question):
    with question.clip.open("rb") as clip:
        file = client.files.create(file=clip, purpose="vision")
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError) as refused:
        chat_about(client, question, file.id)
    assert refused.value.param.startswith("messages[0].content[0]")


def test_a_response_has_the_thinking_and_the_answer(client, question, uploaded):
    response = client.responses.create(model="nano", temperature=0, input=input_about(question, uploaded.id))
    assert response.status == "completed"
    assert response.output_text.strip() == question.answer
    [reasoning, message] = response.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    chat = chat_about(client, question, uploaded.id)
    assert reasoning.summary[0].text == chat.choices[0].message.reasoning_content
    assert response.usage.output_tokens == chat.usage.completion_tokens


def test_a_streamed_response_tells_of_thinking_then_answer(client, question, uploaded):
    asked = {"model": "nano", "temperature": 0, "input": input_about(question, uploaded.id)}
    kinds, said = [], {"response.reasoning_summary_text.delta": "", "response.output_text.delta": ""}
    for number, event in enumerate(client.responses.create(**asked, stream=True)):
        assert event.sequence_number == number
        if not kinds or kinds[-1] != event.type:
            kinds.append(event.type)
        if event.type in said:
            said[event.type] += event.delta
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [kind for kind in kinds if kind in said] == list(said)
    response = event.response
    assert response.output_text == said["response.output_text.delta"]
    assert response.output[0].summary[0].text == said["response.reasoning_summary_text.delta"]
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text.strip() == question.answer


def test_a_conversation_goes_on_from_a_kept_response(client, question, uploaded):
    first = client.responses.create(model="nano", temperature=0, input=input_about(question, uploaded.id))
    again = client.responses.create(
        model="nano", temperature=0, input=question.text, previous_response_id=first.id
    )
    assert again.previous_response_id == first.id
    assert again.usage.input_tokens > first.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="nano", input="Hello?", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"
