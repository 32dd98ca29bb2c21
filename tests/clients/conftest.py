"""What the client tests share: servers on the embedded model, and questions it answers right."""

import base64
import json
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = ROOT / "target/debug/tinyllava"
LOGS = ROOT / "target/clients/logs"
DEMO = ROOT / "models/nano/demo"
KEY = "key-of-the-tests"

# LiteLLM would otherwise ask the web for its price list.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
for variable in ["OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]:
    os.environ.pop(variable, None)


class Server:
    """A running server: `url` without a path, `v1` for clients that want the base of the API."""

    def __init__(self, url):
        self.url, self.v1 = url, f"{url}/v1"


@contextmanager
def serving(*flags):
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{time.time_ns()}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([BINARY, "serve", "--port", "0", *flags], stderr=stderr, cwd=ROOT)
    try:
        yield Server(url_in(log, process))
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()


def url_in(log, process):
    """The address that the server logs once it is ready."""
    for _ in range(600):
        for line in log.read_text().splitlines():
            if "ready: " in line:
                return line.split("ready: ")[1].split()[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready after a minute: {log.read_text()}")


@pytest.fixture(scope="session")
def server():
    """Asks for KEY."""
    with serving("--api-key", KEY) as server:
        yield server


class Question:
    def __init__(self, entry):
        self.clip = DEMO / entry["video"]
        self.text, self.answer = entry["question"], entry["answer"]

    def data_url(self):
        return "data:video/mp4;base64," + base64.b64encode(self.clip.read_bytes()).decode()

    def messages(self):
        """The question in the form most clients pass through."""
        video = {"type": "video_url", "video_url": {"url": self.data_url()}}
        return [{"role": "user", "content": [video, {"type": "text", "text": self.text}]}]


QUESTIONS = [Question(entry) for entry in json.loads((DEMO / "questions.json").read_text())]


@pytest.fixture(params=QUESTIONS, ids=lambda question: question.clip.stem)
def each_question(request):
    return request.param


@pytest.fixture
def question():
    return QUESTIONS[0]


@pytest.fixture(scope="session")
def picture():
    """The first frame of a clip, as PNG."""
    still = ["-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "-"]
    command = ["ffmpeg", "-v", "error", "-i", QUESTIONS[0].clip, *still]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
