"""Requests made up from the served document: none may be a 5xx, and every response is as the document says."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import KEY, ROOT, serving

# Generations stay short, and no made-up URL is fetched.
BOUNDS = ["--max-model-len", "1024", "--default-max-tokens", "8", "--no-remote-urls"]
# A schema cannot say that roles take turns or that a video is one: what it allows may still be a 400. And null is the
# same as absent, also for a field that is in no schema.
BEYOND_A_SCHEMA = "positive_data_acceptance,negative_data_rejection"


def test_made_up_requests_are_never_5xx_and_answered_as_documented():
    with serving("--api-key", KEY, *BOUNDS) as server:
        command = [
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{server.url}/openapi.json",
            *["--header", f"authorization: Bearer {KEY}"],
            *["--phases", "examples,coverage,fuzzing", "--exclude-checks", BEYOND_A_SCHEMA],
            *["--max-examples", "50", "--seed", "1", "--max-time", "60", "--continue-on-failure"],
        ]
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
        done = subprocess.run(command, cwd=ROOT / "target/clients", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
