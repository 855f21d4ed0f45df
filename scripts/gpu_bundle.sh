#!/usr/bin/env bash
# Puts into .gpu/ what a machine with a GPU needs and cannot make: the wheel, the devices' contract
# test as a program, and the peers' wheels for `bench/gpu`. There, without network, compiler or Rust:
#     scripts/test-gpu.sh
#     python3 -m bench.gpu --bundle .gpu --out results/
#
# Held to what such a machine has: CPython 3.12, glibc 2.39, and a bundle below 40 MiB.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
CARGO=${CARGO:-cargo}
TARGET=${CARGO_TARGET_DIR:-target}
GLIBC=2.39
MOST_MIB=40
BUNDLE=.gpu

rm -rf "$BUNDLE/tests" "$BUNDLE"/*.whl
mkdir -p "$BUNDLE/tests" "$BUNDLE/peers"

echo "== the wheel"
VIRTUAL_ENV=$(cd "$(dirname "$PYTHON")/.." && pwd) CARGO_TARGET_DIR=$TARGET \
  "$(dirname "$PYTHON")/maturin" build --release --locked --quiet --out "$BUNDLE"

echo "== the contract tests"
# Each prints the path of its program; the programs carry no debug information.
for test in cuda; do
  program=$(CARGO_PROFILE_TEST_DEBUG=none "$CARGO" test --locked -p tonnage-device --test "$test" --no-run \
      --message-format=json 2>/dev/null |
    "$PYTHON" -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == sys.argv[1]:
        print(message["executable"])' "$test")
  test -x "$program" || { echo "the test $test did not build" >&2; exit 1; }
  cp "$program" "$BUNDLE/tests/$test"
  strip "$BUNDLE/tests/$test"
done

echo "== the reference's tests of its prefetch"
CARGO_TARGET_DIR=$TARGET "$PYTHON" scripts/reference_tests.py --carry "$BUNDLE/reference"

echo "== the peers' wheels"
# name of the folder, requirement
peers="safetensors safetensors==0.8.0
safetensors-rc safetensors==0.9.0rc1
fastsafetensors fastsafetensors==0.5.0
instanttensor instanttensor==0.2.2"
while read -r folder requirement; do
  if ! compgen -G "$BUNDLE/peers/$folder/*.whl" >/dev/null; then
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
      --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 -d "$BUNDLE/peers/$folder" "$requirement"
  fi
done <<<"$peers"

echo "== what it needs of glibc"
check=$(mktemp -d)
trap 'rm -rf "$check"' EXIT
unzip -qo "$BUNDLE"/tonnage-*.whl -d "$check"
for file in $(find "$check" -name '*.so') "$BUNDLE"/tests/*; do
  needs=$(objdump -T "$file" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -1)
  echo "${file#"$check"/}: glibc $needs"
  if [ "$(printf '%s\n' "$needs" "$GLIBC" | sort -V | tail -1)" != "$GLIBC" ]; then
    echo "it needs glibc $needs, and such a machine may have $GLIBC" >&2
    exit 1
  fi
done

size=$(du -sm "$BUNDLE" | cut -f1)
du -sh "$BUNDLE"/*.whl "$BUNDLE"/tests/* "$BUNDLE"/peers/*
if [ "$size" -ge "$MOST_MIB" ]; then
  echo "the bundle has $size MiB, and $MOST_MIB are the most" >&2
  exit 1
fi
echo "$BUNDLE: $size MiB"
