#!/usr/bin/env bash
# Makes .venv from the locks (make setup), or with `server` .venv-server, which has no torch (make setup-server); `uv` prints
# where uv is.
#
# Safe to run again: an environment that is what the locks, the Python and the card ask for is left alone. Which build of torch
# goes in depends on the NVIDIA driver, looked at first:
#   580 or newer   the locked build (CUDA 13), hashes checked
#   older          the same version for that driver's CUDA, from PyTorch's index: uv's --torch-backend=auto, no hashes
#   none           the CPU build where PyTorch's index can be reached, else the locked build, which runs on a CPU too
# With a card the trainer has unsloth, without one it has the small model of the demo and no unsloth.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-trainer}
newest_cuda=580

say() { echo "setup: $*" >&2; }

find_python() { # prints the interpreter to use: $PYTHON, else the one of the last time, else the first that fits
  local name
  for name in ${PYTHON:-$(cat $venv/.python 2>/dev/null) python3 python3.13 python3.12 python3.11}; do
    "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && command -v "$name" && return
  done
  return 1
}

find_driver() { # prints the driver's major version, or nothing
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || version=""
  [[ $version =~ ^([0-9]+)\. ]] && echo "${BASH_REMATCH[1]}" || true
}

is_old_glibc() {
  local version
  version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || return 0
  [[ $version =~ ^glibc\ ([0-9]+)\.([0-9]+) ]] || return 0
  ((BASH_REMATCH[1] * 1000 + BASH_REMATCH[2] < 2028))
}

check_machine() { # everything that is missing, at once, with the line that brings it
  local problems=() packages=() tool
  case "$environment $(uname -sm)" in
    *" Linux x86_64" | "server Linux aarch64") ;;
    *) problems+=("Linux on x86-64 is needed (for make setup-server 64-bit Arm will do), this is $(uname -sm)") ;;
  esac
  ! is_old_glibc || problems+=("glibc 2.28 or newer is needed, this is $(getconf GNU_LIBC_VERSION 2>/dev/null || echo 'another libc')")
  for tool in git make; do
    command -v "$tool" >/dev/null || { problems+=("$tool is missing"); packages+=("$tool"); }
  done
  if [ -z "$python" ]; then
    problems+=("Python 3.11 to 3.13 is needed, ${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>/dev/null || echo missing)")
    command -v python3 >/dev/null && packages+=(python3.11) || packages+=(python3)
  elif ! "$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null; then
    problems+=("libgomp.so.1 is missing (llama.cpp needs it)")
    packages+=(libgomp1)
  fi
  if [ -n "$driver" ] && [ -n "$python" ]; then # Triton compiles its launcher on this machine
    command -v g++ >/dev/null || { problems+=("a C++ compiler is missing (Triton needs it)"); packages+=(build-essential); }
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
      { problems+=("Python.h is missing (Triton needs it)"); packages+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"); }
  fi
  [ ${#problems[@]} -eq 0 ] && return
  for tool in "${problems[@]}"; do say "$tool"; done
  [ ${#packages[@]} -eq 0 ] || say "on Debian or Ubuntu: apt-get install -y ${packages[*]}"
  exit 2
}

is_new_uv() { # --clear came with 0.8
  [[ $("$1" --version 2>/dev/null) =~ ^uv\ ([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] * 1000 + BASH_REMATCH[2] >= 8))
}

find_uv() { # prints a uv: PATH's, else the pinned one, brought by pip or by a venv's pip, its hash checked
  local candidate pinned=(install --quiet --no-deps --only-binary :all: --require-hashes -r requirements/uv.txt)
  for candidate in uv .tools/bin/uv .tools/venv/bin/uv; do
    if is_new_uv "$candidate"; then echo "$candidate"; return; fi
  done
  say "bringing uv into .tools"
  if PIP_ROOT_USER_ACTION=ignore "$python" -m pip "${pinned[@]}" --upgrade --target .tools >&2 && is_new_uv .tools/bin/uv; then echo .tools/bin/uv; return; fi
  if "$python" -m venv .tools/venv >&2 && .tools/venv/bin/pip "${pinned[@]}" >&2 && is_new_uv .tools/venv/bin/uv; then echo .tools/venv/bin/uv; return; fi
  say "no uv could be had: without pip and venv, apt-get install -y python3-venv; else see what pip says above, or https://docs.astral.sh/uv"
  return 1
}

install() { "$uv" pip install --quiet --python "$venv/bin/python" "$@"; }

locked() { # LOCK...: exactly these files' packages, hashes checked
  local lock arguments=()
  for lock in "$@"; do arguments+=(-r "requirements/$lock.txt"); done
  install --no-deps --require-hashes "${arguments[@]}"
}

install_torch() {
  local versions
  versions=$(sed -n 's/^\(torch\|torchvision\)==\([^ ]*\) .*/\1==\2/p' requirements/torch.txt)
  if [ -n "$driver" ] && ((driver >= newest_cuda)); then
    say "NVIDIA driver $driver: torch as locked (CUDA 13)"
    locked torch
  elif [ -n "$driver" ]; then
    say "NVIDIA driver $driver is older than CUDA 13 wants ($newest_cuda): the same torch built for this driver, from PyTorch's index, hashes NOT checked"
    install --torch-backend=auto $versions || { say "that index cannot be reached, or has no such build: update the driver to $newest_cuda or newer, then the locked build is taken"; exit 2; }
  elif cpu_build $versions; then
    say "no NVIDIA card: torch's CPU build from PyTorch's index, hashes NOT checked"
  else
    say "no NVIDIA card, and PyTorch's index with the CPU build cannot be reached: torch as locked, about 3 GB to download"
    locked torch
  fi
}

cpu_build() { # tried without patience first, so that a network that swallows packets costs seconds
  UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 timeout 60 "$uv" pip install --quiet --dry-run --no-deps --python "$venv/bin/python" --torch-backend=cpu "$@" 2>/dev/null &&
    install --no-deps --torch-backend=cpu "$@"
}

driver=$(find_driver)
case $environment in
  server) venv=.venv-server locks="server" ;;
  trainer | uv) venv=.venv locks="$([ -n "$driver" ] && echo trainer || echo demo) server dev" ;;
  *) say "what is '$environment'? nothing: the trainer's environment; server: the server's; uv: where uv is"; exit 2 ;;
esac
python=$(find_python) || python=""
if [ "$environment" = uv ]; then find_uv; exit; fi
wanted=$(cat requirements/setup.sh requirements/*.txt <(echo "$python $driver $locks") | sha256sum)
if [ "$(cat $venv/.ready 2>/dev/null)" = "$wanted" ] && [ -x $venv/bin/python ]; then exit 0; fi

check_machine
uv=$(find_uv)
say "$venv with $("$python" -V) for: $locks"
"$uv" venv --quiet --clear --python "$python" "$venv"
[ "$environment" = server ] || install_torch
locked $locks
"$uv" pip check --quiet --python "$venv/bin/python"
echo "$python" >"$venv/.python"
echo "$wanted" >"$venv/.ready"
say "$venv is ready"
