from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bench import demo, rows


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


def test_an_answer_that_the_release_was_not_made_with_fails_the_demo() -> None:
    demo.check(demo.Shown("at noon", "0 12 * * *", "0 12 * * *"))
    with pytest.raises(demo.Failed, match=r"answers '0 13 \* \* \*', the release was made with '0 12"):
        demo.check(demo.Shown("at noon", "0 12 * * *", "0 13 * * *"))


def test_a_probe_is_a_line_whatever_its_text_holds(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85"}, ensure_ascii=False) + "\n{}\n", encoding="utf-8")
    assert demo.first_probe(path) == {"prompt": "a\u2028b\x85"}


class Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def test_a_proxy_in_the_environment_does_not_stand_between_the_demo_and_its_server() -> None:
    code = "import sys; from bench import demo; print(demo.post(sys.argv[1], {'a': 1}))"
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        command = [sys.executable, "-c", code, f"http://127.0.0.1:{server.server_port}/chat"]
        dead = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run(command, cwd=rows.ROOT, env=dead, capture_output=True, text=True, timeout=30, check=False)
        socket.create_connection(("127.0.0.1", server.server_port)).close()  # ends the thread where nobody came
        thread.join()
    assert done.stdout == "{'a': 1}\n", done.stderr
