#!/usr/bin/env bash
# Type-checks the library crates for aarch64-apple-darwin, on a machine that is none: what is behind
# `cfg(target_vendor = "apple")`, Metal above all, and what the others do where Linux's calls are missing.
# Nothing is linked or run.
#
#   scripts/check-apple.sh
#
# Needs cargo and apt-get with Debian 12's archives (bookworm and its updates). Nothing is installed: a
# compiler with the standard library's sources is downloaded (110 MB) and unpacked under target/apple, once.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
home=$target/apple
tools=$home/root
packages=(rustc-web libstd-rust-web-1.96 libstd-rust-web-dev rust-web-src libllvm22)
crates=(tonnage-format tonnage-plan tonnage-storage tonnage-device tonnage-engine tonnage)

stamp="1 ${packages[*]}"
if [[ ! -f $home/stamp || $(cat "$home/stamp") != "$stamp" ]]; then
  rm -rf "$home"
  mkdir -p "$home/debs" "$tools"
  # As root apt would switch to a user that may not write here.
  (cd "$home/debs" && apt-get -q -o APT::Sandbox::User=root download "${packages[@]}")
  for package in "$home/debs"/*.deb; do
    dpkg -x "$package" "$tools"
  done
  rm -rf "$home/debs"
  echo "$stamp" >"$home/stamp"
fi

start=$SECONDS
# Building the standard library is unstable in cargo; the variable lends it to a stable one.
LD_LIBRARY_PATH=$tools/usr/lib/x86_64-linux-gnu RUSTC_BOOTSTRAP=1 RUSTC=$tools/usr/bin/rustc \
  CARGO_TARGET_DIR=$home/target RUSTFLAGS="-D warnings" \
  cargo check --locked --manifest-path "$root/Cargo.toml" -Z build-std=std,panic_abort \
  --target aarch64-apple-darwin "${crates[@]/#/-p}"
echo "check-apple: ${crates[*]} in $((SECONDS - start)) s"
