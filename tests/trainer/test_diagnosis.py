"""What the doctor makes of a machine's words. The texts are what the commands print, letter by letter; drivers and cards that are not here too."""

from __future__ import annotations

import json

import pytest

from server.engines.ollama import OLDEST
from trainer import diagnosis
from trainer.diagnosis import Card, Line, Place, Said, Torch

T4 = Card("Tesla T4", "580.95.05", (7, 5), 15_360 * 2**20, 15_095 * 2**20)
OLD_T4 = T4._replace(driver="535.104.05")
TORCH = Torch("2.14.1", "13.0")
RAN = Said(0, '{"ran": true}\n')
REINSTALL = "uv pip install --reinstall --torch-backend=auto torch==2.14.1"
GB = 10**9
REFUSED = """\
docker: Error response from daemon: failed to create task for container: failed to create shim task: OCI runtime create failed: runc create \
failed: unable to start container process: error during container init: error running prestart hook #0: exit status 1, stdout: , stderr: \
Auto-detected mode as 'legacy'
nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0, please update your driver to a newer version, or use an earlier \
cuda container: unknown
"""
MORE = "\n\nRun 'docker run --help' for more information\n"
NO_DRIVER = f'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]{MORE}'
NO_RUNTIME = f"docker: Error response from daemon: Unknown runtime specified nvidia{MORE}"
NO_CDI = "docker: Error response from daemon: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all\n"
NOT_LOADED = "nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown.\n"
NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
NEWER_NO_DAEMON = (
    "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and if the daemon is running\n"
)
NOT_YOURS = (
    "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: connect: permission denied\n"
)
NO_TOOLKIT = (
    '{"ServerVersion":"20.10.24+dfsg1","Runtimes":{"io.containerd.runc.v2":{"path":"runc"},"runc":{"path":"runc"}},"CDISpecDirs":null}'
)
TOOLKIT = '{"ServerVersion":"28.2.2","Runtimes":{"nvidia":{"path":"nvidia-container-runtime"},"runc":{"path":"runc"}}}'
CDI = '{"ServerVersion":"28.2.2","Runtimes":{"runc":{"path":"runc"}},"DiscoveredDevices":[{"Source":"cdi","ID":"nvidia.com/gpu=0"}]}'
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\n"


def told(line: Line) -> str:
    return f"{line.status} {line.found} -> {line.remedy}"


@pytest.mark.parametrize(
    ("name", "machine", "libc", "status"),
    [
        ("Linux", "x86_64", "glibc 2.36", "ok"),
        ("Linux", "aarch64", "glibc 2.36", "warn"),
        ("Linux", "x86_64", "glibc 2.27", "fail"),
        ("Linux", "x86_64", "", "fail"),
        ("Darwin", "arm64", "", "fail"),
        ("Linux", "riscv64", "glibc 2.39", "fail"),
    ],
)
def test_linux_on_x86_64_trains_and_on_arm_only_serves(name: str, machine: str, libc: str, status: str) -> None:
    line = diagnosis.system(name, machine, libc)
    assert line.status == status
    assert bool(line.remedy) == (status != "ok")


@pytest.mark.parametrize(("version", "status"), [((3, 10, 12), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")])
def test_python_has_bounds_on_both_sides(version: tuple[int, int, int], status: str) -> None:
    assert diagnosis.python(version, "/usr/bin/python3").status == status


def test_a_card_needs_a_compiler_and_headers_and_a_processor_does_not() -> None:
    assert [line.status for line in diagnosis.build_tools("/usr/bin/g++", "Python.h", header_exists=True, wants_card=True)] == ["ok", "ok"]
    lacking = diagnosis.build_tools(None, "/usr/include/Python.h", header_exists=False, wants_card=True)
    assert [(line.name, line.status) for line in lacking] == [("compiler", "fail"), ("headers", "fail")]
    assert "build-essential" in lacking[0].remedy
    assert "python3-dev" in lacking[1].remedy
    assert {line.status for line in diagnosis.build_tools(None, "Python.h", header_exists=False, wants_card=False)} == {"ok"}


def test_cards_are_read_with_their_capability_and_without() -> None:
    two = Said(0, "Tesla T4, 580.95.05, 7.5, 15360, 15095\nTesla T4, 580.95.05, 7.5, 15360, 400\n")
    assert diagnosis.read_cards(two) == [T4, T4._replace(free_bytes=400 * 2**20)]
    assert diagnosis.read_cards(Said(0, "Tesla T4, 450.51, [N/A], 15360, [N/A]\n")) == [Card("Tesla T4", "450.51", None, 15_360 * 2**20, 0)]
    assert diagnosis.read_cards(Said(6, "No devices were found\n")) == []
    assert diagnosis.read_cards(Said(None)) == []


def test_a_driver_that_answers_is_fine_and_one_that_does_not_is_named() -> None:
    assert diagnosis.driver(Said(0), [T4], wants_card=True).found == "NVIDIA 580.95.05"
    assert diagnosis.driver(Said(None), [], wants_card=False).status == "ok"
    assert diagnosis.driver(Said(None), [], wants_card=True).status == "warn", "the line `card` fails"
    mismatch = diagnosis.driver(Said(18, MISMATCH), [], wants_card=True)
    assert mismatch.status == "fail"
    assert "restart" in mismatch.remedy
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    assert diagnosis.driver(Said(9, failed), [], wants_card=True).status == "fail"


def test_no_card_fails_a_preset_that_trains_on_one_and_no_other() -> None:
    line = diagnosis.card([], wants_card=True, preset="gemma3-12b-t4")
    assert line.status == "fail"
    assert "make demo" in line.remedy
    assert diagnosis.card([], wants_card=False, preset="gemma3-270m-cpu").status == "ok"


def test_a_card_is_named_with_its_capability_and_one_that_is_too_old_refused() -> None:
    assert told(diagnosis.card([T4], wants_card=True, preset="p")) == "ok Tesla T4 (sm_75) -> "
    assert "one is used" in diagnosis.card([T4, T4], wants_card=True, preset="p").found
    old = diagnosis.card([Card("Tesla P100-PCIE-16GB", "580.95.05", (6, 0), 0, 0)], wants_card=True, preset="p")
    assert old.status == "fail"
    assert "sm_60" in old.found


def test_memory_of_the_card_is_held_against_the_plan() -> None:
    assert diagnosis.card_memory([T4], 14_700_000_000, "p").status == "ok"
    busy = diagnosis.card_memory([T4._replace(free_bytes=4 * GB)], 14_700_000_000, "p")
    assert busy.status == "fail"
    assert "other processes" in busy.remedy
    assert "make plan" in diagnosis.card_memory([T4], 18 * GB, "p").remedy
    assert diagnosis.card_memory([T4], None, "p").status == "ok"


def test_torch_that_ran_on_the_card_is_fine_whatever_the_driver_says() -> None:
    assert diagnosis.torch(TORCH, [OLD_T4], RAN, REINSTALL).status == "ok", "forward compatibility packages"
    assert diagnosis.torch(TORCH, [], Said(None), REINSTALL).status == "ok"
    assert diagnosis.torch(None, [T4], Said(1), REINSTALL).remedy == "make setup"


def test_an_old_driver_is_told_the_build_that_suits_it() -> None:
    old = diagnosis.torch(TORCH, [OLD_T4], Said(0, '{"ran": false}\n'), REINSTALL)
    assert old.status == "fail"
    assert "wants driver 580" in old.found
    assert "535.104.05" in old.found
    assert "--torch-backend=auto" in old.remedy
    assert diagnosis.torch(Torch("2.14.1", "12.6"), [OLD_T4], RAN, REINSTALL).status == "ok"


def test_a_cpu_build_beside_a_card_is_told_the_other_build() -> None:
    line = diagnosis.torch(Torch("2.14.1+cpu", None), [T4], Said(0, '{"ran": false}'), REINSTALL)
    assert line.status == "fail"
    assert REINSTALL in line.remedy


def test_other_failures_of_torch_say_its_own_words() -> None:
    error = json.dumps({"error": "CUDA error: no kernel image is available for execution on the device"})
    assert "no kernel image" in diagnosis.torch(TORCH, [T4], Said(0, f"a warning\n{error}\n"), REINSTALL).found
    crashed = diagnosis.torch(
        TORCH, [T4], Said(1, "", "Traceback\nImportError: libcudart.so.13: cannot open shared object file\n"), REINSTALL
    )
    assert "libcudart" in crashed.found
    assert diagnosis.torch(TORCH, [T4], Said(None), REINSTALL).status == "warn", "a slow disk is no fault"


def test_memory_of_the_machine_obeys_the_containers_limit() -> None:
    meminfo = "MemTotal:       13290460 kB\nMemFree:          200000 kB\nMemAvailable:   11000000 kB\n"
    assert diagnosis.memory(meminfo, None, 6 * GB, "p").status == "ok"
    assert diagnosis.memory(meminfo, None, 12 * GB, "p").status == "warn"
    assert diagnosis.memory(meminfo, 4 * GB, 6 * GB, "p").status == "fail"
    assert diagnosis.memory(meminfo, None, None, "p").status == "ok"


def test_a_disk_may_be_short_or_only_tight() -> None:
    assert diagnosis.disk([Place("/a", 50 * GB, 32 * GB, 47 * GB)], "p").status == "ok"
    tight = diagnosis.disk([Place("/a", 40 * GB, 32 * GB, 47 * GB)], "p")
    assert tight.status == "warn"
    assert "hub/" in tight.remedy
    short = diagnosis.disk([Place("/a", 50 * GB, 15 * GB, 15 * GB), Place("/b", 20 * GB, 32 * GB, 32 * GB)], "p")
    assert short.status == "fail"
    assert "paths.cache" in short.remedy
    assert diagnosis.disk([Place("/a", 1, None, None)], "p").status == "ok"


@pytest.mark.parametrize(
    ("info", "status", "remedy"),
    [
        (Said(0, NO_TOOLKIT), "ok", ""),
        (Said(None), "warn", "docker.io"),
        (Said(1, '{"ServerErrors":["x"]}\n', NO_DAEMON), "warn", "systemctl"),
        (Said(1, "", NEWER_NO_DAEMON), "warn", "systemctl"),
        (Said(1, "", NOT_YOURS), "warn", "usermod -aG docker"),
        (Said(1, "", "something new\n"), "warn", "docker info"),
    ],
)
def test_docker_absent_stopped_or_forbidden(info: Said, status: str, remedy: str) -> None:
    line = diagnosis.docker(info)
    assert line.status == status
    assert remedy in line.remedy


@pytest.mark.parametrize(
    ("out", "status"), [("5.6.0\n", "ok"), ("2.24.0\n", "ok"), ("v2.23.3-desktop.2\n", "warn"), ("1.29.2\n", "warn"), ("", "warn")]
)
def test_compose_has_a_least_version(out: str, status: str) -> None:
    assert diagnosis.compose(Said(0, out)).status == status


def test_containers_get_the_card_from_a_runtime_or_the_hook_and_not_from_cdi_alone() -> None:
    assert diagnosis.gpu_runtime(Said(0, TOOLKIT), [T4], False).status == "ok"
    assert diagnosis.gpu_runtime(Said(0, NO_TOOLKIT), [T4], True).status == "ok"
    assert "CDI alone" in diagnosis.gpu_runtime(Said(0, CDI), [T4], False).found
    missing = diagnosis.gpu_runtime(Said(0, NO_TOOLKIT), [T4], False)
    assert missing.status == "warn"
    assert "nvidia-container-toolkit" in missing.remedy
    assert diagnosis.gpu_runtime(Said(0, NO_TOOLKIT), [], False).status == "ok"
    assert diagnosis.gpu_runtime(Said(None), [T4], False).status == "warn"


def test_a_container_refused_for_an_old_driver_is_named_with_both_ways_out() -> None:
    line = diagnosis.gpu_container(Said(125, "", REFUSED), (13, 0), [OLD_T4])
    assert line.status == "warn"
    assert "wants CUDA 13.0 " in line.found
    assert "535.104.05" in line.found
    assert "update the driver to 580" in line.remedy
    assert "make train IN=host" in line.remedy


@pytest.mark.parametrize("error", [NO_DRIVER, NO_RUNTIME, NO_CDI])
def test_a_container_refused_for_want_of_the_toolkit_is_told_so(error: str) -> None:
    assert "nvidia-ctk" in diagnosis.gpu_container(Said(125, "", error), None, [T4]).remedy


def test_a_container_whose_hosts_driver_is_not_loaded_is_told_so() -> None:
    assert "nvidia-smi" in diagnosis.gpu_container(Said(125, "", NOT_LOADED), None, [T4]).remedy


def test_before_the_image_is_built_its_base_tells_what_would_happen() -> None:
    base = diagnosis.wanted_cuda("# why\nARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04\nFROM ${BASE_IMAGE}\n")
    assert base == (13, 0)
    assert diagnosis.wanted_cuda("FROM debian:12\n") is None
    assert "cuda>=13.0" in diagnosis.gpu_container(None, base, [OLD_T4]).found
    assert diagnosis.gpu_container(None, base, [T4]).status == "ok"
    assert diagnosis.gpu_container(None, base, []).status == "ok"
    assert diagnosis.gpu_container(Said(0), base, [T4]).status == "ok"


def test_ollama_with_known_holes_is_named_with_them() -> None:
    silent = Said(0, "", "Warning: could not connect to a running Ollama instance\nWarning: client version is 0.34.4\n")
    assert diagnosis.ollama(silent, None).status == "ok"
    assert diagnosis.ollama(Said(0, "ollama version is 0.34.4\n"), "0.34.4").found == "0.34.4, running"
    assert "CVE-2026-7482" in diagnosis.ollama(Said(0, "ollama version is 0.16.2\n"), None).found
    old = diagnosis.ollama(Said(None), "0.31.1")
    assert old.status == "warn"
    assert "allocate" in old.found
    assert "0.31.2" in old.remedy
    assert diagnosis.ollama(Said(None), None).status == "ok"
    assert diagnosis.OLDEST_OLLAMA == OLDEST, "what the gateway takes"


def test_a_port_is_free_ours_or_taken() -> None:
    assert diagnosis.port(8080, None, "r").status == "ok"
    assert diagnosis.port(8080, "a gateway answers there", "r").status == "ok"
    assert told(diagnosis.port(8080, "", "r")) == "warn taken by another program -> r"


@pytest.mark.parametrize(
    ("cached", "answer", "status", "words"),
    [
        (True, None, "ok", "cache"),
        (False, (200, '{"sha": "0123456789abcdef"}'), "ok", "0123456789ab"),
        (False, (403, "Access to model is restricted"), "fail", "gated"),
        (False, (401, '{"error":"Access to model google/x is gated. Please log in."}'), "fail", "gated"),
        (False, (401, '{"error":"Invalid username or password."}'), "fail", "no such public model"),
        (False, (404, ""), "fail", "no such public model"),
        (False, (503, ""), "warn", "503"),
        (False, None, "fail", "cannot be reached (no route)"),
    ],
)
def test_a_model_is_cached_reachable_gated_or_not(cached: bool, answer: tuple[int, str] | None, status: str, words: str) -> None:
    line = diagnosis.model("google/x", cached, answer, "no route")
    assert line.status == status
    assert words in line.found


def test_missing_pins_are_a_warning() -> None:
    assert diagnosis.pins(Said(0, "")).status == "ok"
    missing = diagnosis.pins(Said(0, "ollama/ollama:0.34.4\nunsloth/gemma-3-12b-it\n"))
    assert missing.status == "warn"
    assert "ollama/ollama:0.34.4, unsloth/gemma-3-12b-it" in missing.found
    assert "make pin" in missing.remedy
    assert diagnosis.pins(Said(None)).status == "ok"
