#!/usr/bin/env bash
# Vulkan drivers that run on the processor, for the tests: Mesa's lavapipe, SwiftShader, and Khronos's
# mock driver, which does no work, and has kinds of memory and queues that the others lack. With them the loader, and
# the validation layer.
#
#   scripts/vulkan-drivers.sh
#
# Needs apt-get with Debian 12's archives (bookworm, its updates and its security updates); not root, and
# nothing is installed: the packages (75 MB) are downloaded and unpacked under target/vulkan, once. The tests
# look there; see crates/device/tests/drivers/mod.rs.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
home=$target/vulkan
packages=(
  # lavapipe, and what it stands on
  mesa-vulkan-drivers libllvm15 libdrm2 libexpat1 libffi8 libwayland-client0 libx11-xcb1 libxau6 libxcb1
  libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 libxcb-sync1 libxcb-xfixes0 libxdmcp6 libxshmfence1
  libbsd0 libedit2 libicu72 libmd0 libtinfo6 libxml2 libz3-4 libzstd1 zlib1g
  libvulkan1
  # SwiftShader, the mock driver, and a validation layer that is newer than Debian's own
  chromium-common
)

fail() {
  echo "vulkan-drivers: $*" >&2
  echo "Without these drivers the tests of Vulkan devices fail. TONNAGE_TEST_VULKAN=none leaves them out." >&2
  exit 1
}

command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
  fail "needs apt-get and dpkg (Debian 12 or its container image)"

# The list of packages and this script's version are part of the stamp.
stamp="3 ${packages[*]}"
if [[ -f $home/stamp && $(cat "$home/stamp") == "$stamp" ]]; then
  exit
fi

start=$SECONDS
work=$home.new.$$
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/debs" "$work/root"

# As root apt would switch to a user that may not write here.
apt=(apt-get -q -o APT::Sandbox::User=root)
fetch() {
  (cd "$work/debs" && "${apt[@]}" "$@" download "${packages[@]}" >"$work/log" 2>&1)
}
if ! fetch; then
  # The machine's lists are missing or old: new ones, kept here.
  lists=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache")
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  "${apt[@]}" "${lists[@]}" update >"$work/log" 2>&1 && fetch "${lists[@]}" || {
    cat "$work/log" >&2
    fail "the packages cannot be downloaded"
  }
fi
for package in "$work/debs"/*.deb; do
  dpkg -x "$package" "$work/root"
done
rm -rf "$work/debs" "$work/lists" "$work/cache" "$work/log"

libraries=usr/lib/$(uname -m)-linux-gnu
# Some packages still put theirs outside /usr.
cp -a "$work/root/${libraries#usr/}/." "$work/root/$libraries"
chromium=usr/lib/chromium
driver() {
  [[ -f $work/root/$2 ]] || fail "the packages have no $2"
  cat >"$work/$1.json" <<JSON
{"file_format_version": "1.0.0", "ICD": {"library_path": "$home/root/$2", "api_version": "1.3.0"}}
JSON
}
driver lavapipe "$libraries/libvulkan_lvp.so"
driver swiftshader "$chromium/libvk_swiftshader.so"
driver mock "$chromium/libVkICD_mock_icd.so"
layer=$chromium/libVkLayer_khronos_validation.so
[[ -f $work/root/$layer ]] || fail "the packages have no $layer"
mkdir "$work/layers"
cat >"$work/layers/validation.json" <<JSON
{"file_format_version": "1.2.0", "layer": {"name": "VK_LAYER_KHRONOS_validation", "type": "GLOBAL",
 "library_path": "$home/root/$layer", "api_version": "1.3.0", "implementation_version": "1",
 "description": "Khronos Validation Layer"}}
JSON
ln -s "root/$libraries" "$work/lib"
# What was Chromium's: everything but the three libraries.
find "$work/root/$chromium" -mindepth 1 -maxdepth 1 ! -name 'libvk_swiftshader.so' \
  ! -name 'libVk*.so' -exec rm -rf {} +
echo "$stamp" >"$work/stamp"
rm -rf "$home"
mv "$work" "$home"
echo "vulkan-drivers: unpacked in $((SECONDS - start)) s"
