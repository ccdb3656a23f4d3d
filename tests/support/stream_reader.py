"""A program that reads the event streams of jobs, at whichever gateway answers, until each has ended.

    python stream_reader.py ADDRESSES '[["JOB", AFTER, TURN], ...]'

It says every event on its standard output as one line, `JOB SEQ KIND JSON`, and goes on after the last one it has
said: whoever kills it may start another with what it said. ADDRESSES is a file with the URL of a gateway in each
line, read again at every connection; TURN says which is the first. The standard library alone, so that it starts
soon. Its end is 0 when all streams have ended, 1 after an answer that no reader should get.
"""

import http.client
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

RETRY_S = 0.05  # between connections
TIMEOUT_S = 60.0  # of silence; a gateway beats every 15 s

said = threading.Lock()


def main() -> None:
    addresses = Path(sys.argv[1])
    threads = [threading.Thread(target=follow, args=(addresses, *one)) for one in json.loads(sys.argv[2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def follow(addresses: Path, job_id: str, after: int, turn: int) -> None:
    while True:
        urls = addresses.read_text().split()
        try:
            for event in events(urls[turn % len(urls)], job_id, after):
                say(f"{job_id} {event['seq']} {event['kind']} {json.dumps(event)}\n")
                after = event["seq"]
                if event["kind"] == "end":
                    return
        except (OSError, http.client.HTTPException):  # the gateway is gone: another one has the stream too
            pass
        turn += 1
        threading.Event().wait(RETRY_S)


def events(url: str, job_id: str, after: int) -> Iterator[dict[str, Any]]:
    """What one connection gives. A frame that was cut off is no event."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(after)} if after else {})
        answer = connection.getresponse()
        if answer.status == 503:
            return
        if answer.status != 200:
            sys.stderr.write(f"{job_id} after {after}: {answer.status} {answer.read()!r}\n")
            os._exit(1)
        data = b""
        while line := answer.readline():
            if line.startswith(b"data: "):
                data = line[6:]
            elif line == b"\n" and data:
                yield json.loads(data)
                data = b""
    finally:
        connection.close()


def say(line: str) -> None:
    rest = line.encode()
    with said:
        while rest:
            rest = rest[os.write(1, rest) :]


if __name__ == "__main__":
    main()
