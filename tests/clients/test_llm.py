"""The command `llm`, with the server in its extra-openai-models.yaml: text, a picture, a conversation, a schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY

LLM = Path(sys.executable).with_name("llm")


@pytest.fixture
def llm(server, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: nano\n  model_name: nano\n  api_base: {server.v1}\n  api_key_name: nano\n"
        "  vision: true\n  supports_schema: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"nano": KEY}))

    def run(*arguments, stdin=None):
        command = [LLM, "prompt", "--model", "nano", "-o", "temperature", "0", "-o", "max_tokens", "160", *arguments]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, input=stdin, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    return run


def test_stream_says_the_same_as_a_unary_reply(llm):
    assert llm("What is shown?") == llm("What is shown?", "--no-stream") != ""


def test_picture_is_an_attachment(llm, picture):
    assert llm("What is shown?", "--attachment-type", "-", "image/png", stdin=picture)


def test_conversation_is_continued(llm):
    llm("What is shown?")
    assert llm("Why?", "--continue")


def test_schema_is_held(llm):
    schema = {"type": "object", "properties": {"letter": {"enum": ["A", "B"]}}, "required": ["letter"]}
    reply = llm("Which one?", "--schema", json.dumps(schema | {"additionalProperties": False}))
    assert json.loads(reply)["letter"] in "AB"
