#!/usr/bin/env bash
# The format crate where hosts differ: its tests on a big-endian machine (s390x, under qemu) and on a
# 32-bit one (wasm32, in node), and a build for a target that has no standard library at all.
#
#   scripts/test-cross.sh [s390x] [wasm32] [nostd]     (all of them without an argument)
#
# Needs cargo, node and apt-get with Debian 12's archives (bookworm and its updates). Nothing is
# installed: the compiler with its sources, the linkers, the C libraries and qemu are downloaded as
# packages (240 MB) and unpacked under target/cross, once.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
cross=$target/cross
tools=$cross/root
packages=(
  # A compiler with the standard library's sources, which rustup has for some toolchains only.
  rustc-web libstd-rust-web-1.96 libstd-rust-web-dev rust-web-src libllvm22 lld-22
  # s390x: a linker, the C library, an emulator.
  gcc-12-s390x-linux-gnu binutils-s390x-linux-gnu libbinutils libctf0 libctf-nobfd0 libjansson4
  libgcc-12-dev-s390x-cross libgcc-s1-s390x-cross libc6-s390x-cross libc6-dev-s390x-cross
  qemu-user-static
  # wasm32
  wasi-libc
)

unpack() {
  local stamp=$cross/unpacked
  # The list of packages is part of the stamp, so a changed list unpacks anew.
  if [[ -f $stamp && $(cat "$stamp") == "${packages[*]}" ]]; then
    return
  fi
  rm -rf "$cross/debs" "$tools" "$stamp"
  mkdir -p "$cross/debs" "$tools"
  # As root apt would switch to a user that may not write here.
  (cd "$cross/debs" && apt-get -q -o APT::Sandbox::User=root download "${packages[@]}")
  for package in "$cross/debs"/*.deb; do
    dpkg -x "$package" "$tools"
  done
  rm -rf "$cross/debs"
  echo "${packages[*]}" >"$stamp"
}

# Building the standard library is unstable in cargo; the variable lends it to a stable one.
cross_cargo() {
  local command=$1
  shift
  LD_LIBRARY_PATH=$tools/usr/lib/x86_64-linux-gnu RUSTC_BOOTSTRAP=1 RUSTC=$tools/usr/bin/rustc \
    CARGO_TARGET_DIR=$cross/target CARGO_PROFILE_TEST_DEBUG=false \
    cargo "$command" --locked --manifest-path "$root/Cargo.toml" -p tonnage-format "$@"
}

# Generated cases: an emulator is slow, and what differs here differs in the first thousand.
export TONNAGE_CASES=${TONNAGE_CASES:-3000}

s390x() {
  export CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_LINKER=$tools/usr/bin/s390x-linux-gnu-gcc-12
  export CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_RUNNER=$tools/usr/bin/qemu-s390x-static
  # Static, so that the emulator needs no libraries of the target.
  export CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
  cross_cargo test -Z build-std=std,panic_unwind --target s390x-unknown-linux-gnu \
    --lib --tests --no-fail-fast
}

wasm32() {
  local libc=$tools/usr/lib/wasm32-wasi
  export CARGO_TARGET_WASM32_WASIP1_LINKER=$tools/usr/lib/llvm-22/bin/wasm-ld
  export CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings $root/scripts/run-wasi.mjs"
  # Debian's libc is older than what std may call to join threads, which wasm32 cannot start: such
  # a call becomes a trap.
  export CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS="-C link-self-contained=no -L $libc -C link-arg=$libc/crt1-command.o -C link-arg=--unresolved-symbols=ignore-all"
  cross_cargo test -Z build-std=std,panic_abort --target wasm32-wasip1 \
    --lib --tests --no-fail-fast
}

nostd() {
  cross_cargo build --no-default-features -Z build-std=core,alloc --target thumbv7em-none-eabi
}

unpack
for job in "${@:-s390x wasm32 nostd}"; do
  # Unquoted: the default is three words.
  for name in $job; do
    case $name in
      s390x | wasm32 | nostd) ;;
      *) echo "unknown job $name: one of s390x, wasm32, nostd" >&2 && exit 2 ;;
    esac
    start=$SECONDS
    ("$name")
    echo "test-cross: $name passed in $((SECONDS - start)) s"
  done
done
