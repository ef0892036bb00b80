"""A network that does not respond gives a one-line error instead of the library's messages."""

import os
import subprocess
import sys

FETCH = """
import logging, huggingface_hub.utils._http as http
from repa.cli import console
console.tell_retries_once()
for number in (1, 2):
    http.logger.warning("'[Errno 111] Connection refused' thrown while requesting HEAD http://127.0.0.1:9/x")
    http.logger.warning("Retrying in 1s [Retry %d/5].", number)
logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=2)) after connection broken")
http.logger.warning("A token is missing.")
"""


def test_retries_give_a_one_line_error():
    done = subprocess.run([sys.executable, "-c", FETCH], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "repa: The server does not answer. Retrying for up to a minute.", "A token is missing.",
    ]  # fmt: skip


def test_a_hub_that_refuses_connections_gives_a_one_line_error(tmp_path):
    """The real client, without pauses: it lists a repository once and retries only file downloads."""
    code = (
        "import sys, time; time.sleep = lambda seconds: None; from repa.cli.main import main; "
        "sys.argv[1:] = ['prepare', 'photographs:num=2', sys.argv[1], '--resolution', '32', '--features', 'dinov2-b']; main()"
    )
    here = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "REPA_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=False,
        env={**os.environ, **here},
    )  # fmt: skip
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "facebook/dinov2-base" in sentence
    assert "--feature-weights dinov2-b=" in sentence
