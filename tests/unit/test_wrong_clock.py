"""A process whose wall clock is wrong, for `fluffle chaos`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from fluffle.chaos.processes import wrong_clock

TELL = """
import datetime, json, time
told = [
    time.time(), time.time_ns() / 1e9, time.clock_gettime(time.CLOCK_REALTIME), datetime.datetime.now().timestamp(),
    datetime.datetime.now(datetime.UTC).timestamp(),
    datetime.datetime.utcnow().replace(tzinfo=datetime.UTC).timestamp(),
]
print(json.dumps([told, time.monotonic()]))
"""
SLACK_S = 30.0  # of a busy machine


@pytest.mark.parametrize("off_s", [-7 * 86400, -90, 0, 3600])
def test_every_clock_of_the_wall_is_off_and_no_other(off_s: int) -> None:
    environment = {**os.environ, **wrong_clock(off_s)}
    command = (sys.executable, "-W", "ignore", "-c", TELL)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    told, monotonic = json.loads(done.stdout)
    assert told == pytest.approx([time.time() + off_s] * len(told), abs=SLACK_S)
    assert monotonic == pytest.approx(time.monotonic(), abs=SLACK_S)
