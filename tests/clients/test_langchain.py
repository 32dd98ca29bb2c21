"""LangChain: ChatDeepSeek, which shows the thinking, and ChatOpenAI, which leaves it out."""

from conftest import KEY
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI


def test_chat_deepseek_shows_the_thinking_and_the_answer(server, question):
    chat = ChatDeepSeek(model="nano", api_base=server.v1, api_key=KEY, temperature=0)
    reply = chat.invoke(question.messages())
    assert reply.content.strip() == question.answer
    assert reply.additional_kwargs["reasoning_content"]
    assert reply.usage_metadata["output_tokens"] > 0


def test_chat_deepseek_streams_both(server, question):
    chat = ChatDeepSeek(model="nano", api_base=server.v1, api_key=KEY, temperature=0)
    reasoning, content = "", ""
    for chunk in chat.stream(question.messages()):
        reasoning += chunk.additional_kwargs.get("reasoning_content", "")
        content += chunk.content
    reply = chat.invoke(question.messages())
    assert (reasoning, content) == (reply.additional_kwargs["reasoning_content"], reply.content)


def test_chat_openai_answers(server, question):
    chat = ChatOpenAI(model="nano", base_url=server.v1, api_key=KEY, temperature=0)
    assert chat.invoke(question.messages()).content.strip() == question.answer


def test_chat_openai_shows_the_thinking_of_the_responses_api(server, question):
    chat = ChatOpenAI(model="nano", base_url=server.v1, api_key=KEY, temperature=0, use_responses_api=True)
    # LangChain drops parts that it does not know; this one it passes on.
    video = {"type": "input_file", "file_data": question.data_url(), "filename": question.clip.name}
    reply = chat.invoke([{"role": "user", "content": [video, {"type": "text", "text": question.text}]}])
    assert reply.text.strip() == question.answer
    assert any(block["type"] == "reasoning" for block in reply.content_blocks)
