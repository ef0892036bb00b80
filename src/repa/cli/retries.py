"""What libraries say while they try a network again and again: one sentence in place of their lines."""

import logging
import sys

from repa.cli.console import speaks

LOGGERS = ("huggingface_hub.utils._http", "urllib3.connectionpool")
SIGNS = ("Retrying", "thrown while requesting")  # their messages are warnings; errors reach the user


class OneSentence(logging.Filter):
    """Drops the messages of retries; the first is answered with a sentence of ours."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or not any(sign in record.getMessage() for sign in SIGNS):
            return True
        if speaks() and not self.told:
            print("repa: The server does not answer; trying again for up to a minute.", file=sys.stderr, flush=True)
        self.told = True
        return False


def told_once() -> None:
    """From now on, in this process."""
    one = OneSentence()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(one)
