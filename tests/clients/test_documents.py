"""The examples of README.md and docs/clients.md, run as they stand there; only the port is another one."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, serving

MODULES = ROOT / "target/clients"
PLACE = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def open_server():
    with serving() as server:
        yield server


def examples(document, languages):
    """Code blocks of these languages, each with the heading it stands under."""
    text = (ROOT / document).read_text()
    found, heading = [], document
    for title, language, code in re.findall(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        heading = title or heading
        if code and language in languages:
            found.append(pytest.param(language, code, id=f"{document}: {heading} {len(found)}"))
    return found


def run(language, code, server):
    code = code.replace(PLACE, server.url.removeprefix("http://"))
    if language == "js":
        # Beside node_modules, where its imports are looked for.
        file = MODULES / "example.mjs"
        file.write_text(code)
        command = ["node", file]
    else:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def content_of_stream(text):
    """What the answer's deltas say, after whole thinking and before [DONE]."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert any(choice["delta"].get("reasoning_content") for choice in choices), text
    return "".join(choice["delta"].get("content") or "" for choice in choices)


README = [block for block in examples("README.md", [""]) if block.values[1].startswith("curl")]
CLIENTS = examples("docs/clients.md", ["sh", "python", "js"])


def test_no_example_is_overlooked():
    assert len(README) >= 2 and len(CLIENTS) >= 5


@pytest.mark.parametrize("language,code", README + CLIENTS)
def test_an_example_prints_the_answer(open_server, language, code):
    assert PLACE in code
    printed = run(language, code, open_server)
    answer = content_of_stream(printed) if "curl" in code else printed.strip().splitlines()[-1].removeprefix("→ ")
    assert answer.strip() == "A", printed
