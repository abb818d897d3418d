from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench import demo


def test_a_training_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(demo.Failed) as failed:
        demo.train(tmp_path, "no-such-preset", [])
    assert failed.value.code == 2


def test_a_taken_port_is_passed_by() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", demo.PORT))
        except OSError:
            pass  # taken by another program: all the better
        else:
            taken.listen()
        assert demo.free_port() not in {0, demo.PORT}


def test_a_server_that_stops_is_not_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    process.wait()
    with pytest.raises(demo.Failed, match="stopped before it was ready") as failed:
        demo.wait_until_ready(process, "http://127.0.0.1:9")
    assert failed.value.code == 2
