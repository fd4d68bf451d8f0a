"""Keeping secrets out of what is said and written.

A recipe is copied into run folders, checkpoints, model cards and wandb, so it must not hold a secret; one that does is
refused. Messages of libraries can hold more than one would like, such as signed addresses, and are cleaned.
"""

from __future__ import annotations

import logging
import os
import re

STARS = "***"
NAMES = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key|credential)")
PLACES = re.compile(r"(?i)_(path|file|dir|folder|sock)$")
SHORTEST = 8  # characters: a shorter value of the environment is more likely to be a word
URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
URL_QUERY = re.compile(
    r"(?i)([?&;][\w.-]*(?:token|secret|password|key|signature|sig|credential|policy)[\w.-]*=)[^&\s'\"<>]+"
)
TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|wandb_v1_\w{20,}|pypi-[A-Za-z0-9_-]{20,})"
)
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{20,}")


def redact(text: str) -> str:
    """The text with stars for secrets: values of such environment variables, users of URLs, known kinds of tokens."""
    for value in environment_secrets():
        text = text.replace(value, STARS)
    text = URL_QUERY.sub(rf"\g<1>{STARS}", URL_USER.sub(STARS, text))
    return BEARER.sub(rf"\g<1> {STARS}", TOKENS.sub(STARS, text))


def environment_secrets() -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    named = {name: value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}
    # A variable such as TOKENIZERS_PARALLELISM=disabled or SSH_KEY_PATH=/home/me holds no secret.
    values = {value for name, value in named.items() if not PLACES.search(name) and not os.path.exists(value)}
    likely = (value for value in values if not (value.isalpha() and len(value) < 16))
    return sorted(likely, key=len, reverse=True)


class Redacted(logging.Formatter):
    """Formats log lines, tracebacks too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
