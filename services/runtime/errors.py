"""The one exception tree.

Classes are split by what the caller does, not by who failed:

    TesseraError
    ├── Retry       transient: the same call may succeed later (store away, deadline passed)
    ├── Conflict    somebody else was first: re-read, decide again
    ├── Invalid     the input is at fault: tell the user, do not retry
    ├── NotFound    the named object does not exist
    ├── Exhausted   a bounded thing is full: tell the user what to free or raise
    └── Unusable    this machine cannot do it (no root, no bpffs, kernel without a feature): stop

A message says what is wrong, with which object, and what would fix it, in one line.
REST maps these in apid/rest/errors.py and gRPC in wire/server.py; nowhere else.
"""


class TesseraError(Exception):
    """Base of everything Tessera raises on purpose."""


class Retry(TesseraError):
    """Transient; the caller may try again after a pause."""


class Conflict(TesseraError):
    """A transaction lost; the caller re-reads and decides again."""


class Invalid(TesseraError):
    """The caller's input is wrong; retrying cannot help."""


class NotFound(TesseraError):
    """The named object does not exist."""


class Exhausted(TesseraError):
    """A bounded resource is full."""


class Unusable(TesseraError):
    """The machine or its configuration lacks something Tessera needs."""
