"""DNS names against the patterns of toFQDNs and dns rules.

`*` stands for any run of letters, digits, '-' and '_', so never for a dot; a leading `**.` for one
or more labels; the pattern `*` alone for every name. Case and a last dot do not count.
"""

from __future__ import annotations

import re
from functools import lru_cache

from identity.labels import FQDN, Label

_RUN = "[-a-zA-Z0-9_]*"
_LABELS = r"([-a-zA-Z0-9_]+\.)+"


def name_matches(pattern: str, name: str) -> bool:
    return _compiled(pattern).fullmatch(name.lower().rstrip(".")) is not None


def label_of(pattern: str) -> Label:
    """What an address carries that was learnt for the pattern."""
    return Label(FQDN, pattern, "")


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    text = pattern.lower().rstrip(".") or pattern
    if text == "*":
        return re.compile(".*")
    head, rest = (_LABELS, text[3:]) if text.startswith("**.") else ("", text)
    # Stars in a row say what one says; one run each keeps matching linear.
    parts = re.split(r"\*+", rest)
    return re.compile(head + _RUN.join(map(re.escape, parts)))
