#!/usr/bin/env bash
# Fuzzes the format, plan, foreign and quant crates with cargo-fuzz, target by target, on one core and at low priority.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]     60 s each of header, index, roundtrip, slice, plan_json, gguf, ggml
#   MINIMISE=1 scripts/fuzz.sh ...            then rewrite fuzz/corpus/ with a smallest covering set
#
# A finding stops the run and lies in fuzz/artifacts/TARGET/. The committed corpus and the
# conformance corpus are the seeds; what a run adds stays under target/fuzz for the next one.
# Needs a C++ compiler for libFuzzer. cargo-fuzz is installed under target/tools if it is missing.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
work=$target/fuzz
seconds=${1:-60}
shift || true
targets=("${@:-header index roundtrip slice plan_json gguf ggml}")
read -ra targets <<<"${targets[*]}"

export PATH=$target/tools/bin:$PATH
if ! command -v cargo-fuzz >/dev/null; then
  cargo install --quiet --locked --root "$target/tools" cargo-fuzz
fi

# The flags are nightly's; the variable lends them to a stable compiler. No sanitizer: the crates
# forbid unsafe code, and run about five times as often without one. Overflow checks stay on.
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/build
(cd "$root/fuzz" && cargo fuzz build --sanitizer none)
programs=$work/build/$(rustc -vV | sed -n 's/^host: //p')/release

for name in "${targets[@]}"; do
  corpus=$work/corpus/$name
  findings=$root/fuzz/artifacts/$name
  mkdir -p "$corpus" "$findings"
  seeds=("$root/fuzz/corpus/$name")
  [[ $name == header || $name == index ]] && seeds+=("$root/conformance/files")
  options=(-max_len=512 -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$findings/")
  [[ -f $root/fuzz/$name.dict ]] && options+=(-dict="$root/fuzz/$name.dict")
  # A super-block of values is 1024 bytes.
  [[ $name == ggml ]] && options+=(-max_len=2100)
  log=$work/$name.log
  if ! nice -n 10 "$programs/$name" "$corpus" "${seeds[@]}" "${options[@]}" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "fuzz: $name failed; the input is in $findings" >&2
    exit 1
  fi
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  echo "fuzz: $name: $runs executions in $seconds s, no finding"
  if [[ -n ${MINIMISE:-} ]]; then
    rm -rf "$work/smallest" && mkdir -p "$work/smallest"
    "$programs/$name" -set_cover_merge=1 -use_counters=0 -max_len=512 \
      "$work/smallest" "$corpus" "${seeds[@]}" >"$log" 2>&1
    rm -f "$root/fuzz/corpus/$name"/*
    cp "$work/smallest"/* "$root/fuzz/corpus/$name/"
  fi
done
