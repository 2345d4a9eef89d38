#!/usr/bin/python3 -ISE
"""The CNI plugin `tessera`: hands a runtime's request to the node's agent and prints its answer.

Nothing but built-in modules, so that it starts in milliseconds; datapath/cni/service.py decides.
`tessera cni install` puts it where runtimes look, with the agent's socket in it.
"""

import _socket
import posix
import time

SOCKET = "/run/tessera/agent.sock"
VERSIONS = b'"0.3.1","0.4.0","1.0.0","1.1.0"'
AGENT_DEADLINE_S = 10  # for an agent that is just starting
ANSWER_DEADLINE_S = 60.0
PAUSE_S = 0.1


def main() -> None:
    command = posix.environ.get(b"CNI_COMMAND", b"")
    config = b"".join(iter(lambda: posix.read(0, 1 << 16), b""))
    variables = (
        name + b"=" + value for name, value in posix.environ.items() if name[:4] == b"CNI_"
    )
    body = b"\0".join(variables) + b"\0\0" + config
    try:
        agent = connect(wait=command not in (b"STATUS", b"VERSION"))
        agent.settimeout(ANSWER_DEADLINE_S)
        agent.sendall(b"POST /v1/cni HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b"".join(iter(lambda: agent.recv(1 << 16), b""))
    except OSError as error:
        if command == b"VERSION":
            say(b'{"cniVersion":"%s","supportedVersions":[%s]}' % (asked(config), VERSIONS), 0)
        code = 50 if command == b"STATUS" else 11
        refuse(config, code, f"the node's agent at {SOCKET} does not answer: {error}")
    head, _, result = answer.partition(b"\r\n\r\n")
    status = head[9:12]
    if status not in (b"200", b"422"):
        words = f"the node's agent failed ({status.decode()}); its log has the reason"
        refuse(config, 11, words)
    say(result, status != b"200")


def connect(*, wait: bool) -> _socket.socket:
    for _ in range(int(AGENT_DEADLINE_S / PAUSE_S)):
        agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            agent.connect(SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            if not wait:
                break
            time.sleep(PAUSE_S)
        else:
            return agent
    raise ConnectionRefusedError(
        "not running; start it (`tessera up`, or its unit), or see its log"
    )


def asked(config: bytes) -> bytes:
    """The request's cniVersion, found without a JSON parser."""
    words = config.split(b'"')
    return words[words.index(b"cniVersion") + 2] if b"cniVersion" in words[:-2] else b"1.0.0"


def refuse(config: bytes, code: int, message: str) -> None:
    words = message.replace("\\", "/").replace('"', "'").encode()
    say(b'{"cniVersion":"%s","code":%d,"msg":"%s"}' % (asked(config), code, words), 1)


def say(text: bytes, status: int) -> None:
    posix.write(1, text)
    posix._exit(status)  # noqa: SLF001  taking the interpreter down is of no use to anybody


if __name__ == "__main__":
    main()
