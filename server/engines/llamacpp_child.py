"""The embedded engine's child process: llama.cpp's own HTTP server on a free port of the loopback.

Run as a file, not as a module, and imports nothing of the gateway. Reads one JSON line from stdin (gguf, num_ctx, slots,
threads, key), prints one JSON line with address and device, and lives until stdin closes: the kernel closes it when the gateway
dies, however it dies, so no llama.cpp is ever left behind.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


def serve(settings: dict[str, Any]) -> Any:
    """Load the model; the returned server answers until it is dropped."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.n_ctx = settings["num_ctx"] * settings["slots"]  # llama.cpp deals it out evenly
    params.n_parallel = settings["slots"]
    params.kv_unified = False
    params.fit_params = False  # else it may shrink the context to fit memory, silently
    params.ctx_shift = False  # else an answer that outgrows the context forgets its question, silently
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["key"]]  # other users of this machine can reach the loopback too
    params.ui = False
    params.endpoint_slots = False  # it would show prompts, and nobody asks it
    params.use_jinja = False
    params.verbosity = 2  # warnings and errors: no prompt ever reaches the log
    return xllamacpp.Server(params)


def device() -> str:
    """llama.cpp puts every layer on a graphics card where it has one."""
    import xllamacpp

    return "gpu" if any(found["type"].name.endswith("GPU") for found in xllamacpp.get_device_info()) else "cpu"


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    # A thread of its own sees the parent die even while the model is being loaded.
    threading.Thread(target=_until_parent_dies, daemon=True).start()
    server = serve(settings)
    print(json.dumps({"address": server.listening_address, "device": device()}), flush=True)
    threading.Event().wait()


def _until_parent_dies() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)  # llama.cpp's own shutdown waits for answers that nobody will read


if __name__ == "__main__":
    main()
