#!/usr/bin/env bash
# Writes requirements/*.txt from pyproject.toml, or with --check says whether they are current.
#
# Pins that still hold are kept, so that a release somewhere changes nothing here; UPGRADE=1 takes the newest instead. Hashes and
# no index: any mirror serves them. torch, triton and NVIDIA's libraries stand alone in torch.txt (the machine decides which
# build is installed, see setup.sh) and are left out of the others; all of them are complete, so they are installed with --no-deps.
# The server's lock holds for 64-bit Arm too.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}
locks="torch trainer server demo dev audit"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The same project, whose environments have a twin on Arm.
mkdir "$work/arm"
sed -E 's/^environments = \[(".*)x86_64(.*")\]$/environments = [\1x86_64\2, \1aarch64\2]/' pyproject.toml >"$work/arm/pyproject.toml"
both="((platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux'))"

compile() { # FOLDER OUTPUT ARGUMENT...: OUTPUT's present contents are what uv keeps where it can
  local folder=$1
  shift
  "$uv" --directory "$folder" pip compile pyproject.toml --quiet --universal --generate-hashes --no-annotate --custom-compile-command "make lock" \
    --output-file "$@" ${UPGRADE:+--upgrade}
}

seed() { # the present pins that have to do with a lock: its own and, since they were cut out of it, those of torch.txt
  cat "requirements/$1.txt" requirements/torch.txt 2>/dev/null || true
}

machine() { # only, or without, what depends on the machine's torch
  awk -v keep="$1" '/^[a-z]/ { on = ($0 ~ /^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/) == keep } /^#/ || on' "$2"
}

make_lock() { # NAME ARGUMENT...
  seed "$1" >"$work/$1.full"
  compile "$([ "$1" = server ] && echo "$work/arm" || echo .)" "$work/$1.full" --extra "$1" "${@:2}"
  machine "$([ "$1" = torch ] && echo 1 || echo 0)" "$work/$1.full" >"$work/$1.txt"
}

if [ "${1:-}" = --check ]; then
  stale=""
  for name in $locks; do
    make_lock "$name"
    cmp -s "$work/$name.txt" "requirements/$name.txt" || { stale="$stale requirements/$name.txt"; diff -u "requirements/$name.txt" "$work/$name.txt" | grep '^[-+][a-z]' >&2 || true; }
  done
  # One version of a package (per Python) in all of them: they are installed into the same environment.
  twice=$(sed -n "s/ \\\\$//; s/$both/platform_machine == 'x86_64' and sys_platform == 'linux'/; /^[a-z].*==/p" requirements/*.txt | sort -u | sed 's/==[^ ]*//' | uniq -d)
  [ -z "$stale" ] || echo "not what pyproject.toml asks for:$stale; run: make lock" >&2
  [ -z "$twice" ] || echo "the locks disagree on: $(echo "$twice" | sed 's/ .*//' | tr '\n' ' '); run: make lock" >&2
  # Wheels for Arm, not only versions: nothing is installed.
  lacks=""
  "$uv" pip install --quiet --dry-run --target "$work/target" --python-platform aarch64-manylinux_2_28 --python-version 3.13 --only-binary :all: \
    --no-deps --require-hashes -r requirements/server.txt || lacks="requirements/server.txt has no wheels for 64-bit Arm"
  [ -z "$lacks" ] || echo "$lacks" >&2
  [ -z "$stale$twice$lacks" ]
else
  for name in $locks; do seed "$name"; done >"$work/all.txt"
  compile . "$work/all.txt" --all-extras
  sed -n 's/ \\$//; /^[a-z].*==/p' "$work/all.txt" >"$work/pins.txt"
  for name in $locks; do
    make_lock "$name" --constraint "$work/pins.txt"
  done
  for name in $locks; do mv "$work/$name.txt" "requirements/$name.txt"; done
fi
