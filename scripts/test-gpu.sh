#!/usr/bin/env bash
# The suite on a machine with a GPU: the devices' contract, then the Python tests with PyTorch, CuPy
# and JAX. Where Rust is installed it builds what it runs; elsewhere it takes the bundle `.gpu/` that
# `make gpu-bundle` made. Needs a python3 with PyTorch and pytest; PYTHON names another one.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT

if [ "${TONNAGE_BUNDLE:-}" = "" ] && command -v cargo >/dev/null && [ -x .venv/bin/maturin ]; then
  echo "== building"
  BUNDLE=$SITE/bundle
  VIRTUAL_ENV=$PWD/.venv .venv/bin/maturin build --release --locked --quiet --out "$BUNDLE"
  cargo test --locked --quiet -p tonnage-device --test cuda
else
  BUNDLE=${TONNAGE_BUNDLE:-.gpu}
  compgen -G "$BUNDLE/tonnage-*.whl" >/dev/null ||
    { echo "no Rust here, and no wheel in $BUNDLE: run \`make gpu-bundle\` where there is Rust, and bring it" >&2; exit 2; }
  for program in "$BUNDLE"/tests/*; do
    echo "== contract: ${program##*/}"
    # One thread: the tests look at how much of the device's memory is free.
    TONNAGE_TEST_GPU=1 TONNAGE_EXPECT_GPU=1 "$program" --test-threads=1
  done
fi

echo "== Python"
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-cache-dir --target "$SITE/python" "$BUNDLE"/tonnage-*.whl
# The package that was installed, not the checkout's; a missing GPU is a failure here, no skip.
PYTHONPATH="$SITE/python" TONNAGE_TEST_GPU=1 TONNAGE_EXPECT_GPU=1 PYTHONDONTWRITEBYTECODE=1 \
  "$PYTHON" -m pytest -q -p no:cacheprovider "$@" tests/python/gpu

if [ -d "$BUNDLE/reference" ]; then
  echo "== the reference's tests of its prefetch, on Tonnage"
  PYTHONPATH="$SITE/python:$PWD/tests/reference_plugin" PYTHONDONTWRITEBYTECODE=1 \
    "$PYTHON" -m pytest -q -p no:cacheprovider -p tonnage_in_place -c /dev/null \
    --rootdir "$BUNDLE/reference" "$BUNDLE/reference"
fi
