"""A null server as a command starts it: `python tests/launched_server.py --port N --model NAME …`.

--note FILE    append a line of JSON: its pid, that of its helper, its arguments and variables
--say TEXT     print it first
--fail CODE    exit with this code
--megabytes N  hold N MB of memory
--deaf         ignore the request to end
--tell NAME    print this variable
--die S        crash after S seconds
--late S       listen after S seconds
It starts a helper process in a separate session, as some servers do for their engines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import null_server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", default="null:")
    parser.add_argument("--quant", default="not given")
    parser.add_argument("--note")
    parser.add_argument("--say", default="")
    parser.add_argument("--tell", default="")
    parser.add_argument("--fail", type=int)
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--die", type=float)
    parser.add_argument("--late", type=float, default=0)
    given = parser.parse_args()
    print(given.say, os.environ.get(given.tell, ""), flush=True)
    if given.fail is not None:
        raise SystemExit(given.fail)
    held = bytearray(os.urandom(1 << 20) * given.megabytes)
    if given.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if given.note:
        note = {
            "pid": os.getpid(),
            "helper": helper.pid,
            "quant": given.quant,
            "model": given.model,
            "variables": dict(os.environ),
        }
        with open(given.note, "a") as file:
            file.write(json.dumps(note) + "\n")
    time.sleep(given.late)
    if given.die:
        threading.Timer(given.die, os._exit, (7,)).start()
    asyncio.run(null_server.serve(given.port, [given.model]))
    del held


if __name__ == "__main__":
    main()
