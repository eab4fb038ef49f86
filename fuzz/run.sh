#!/bin/sh
# Runs the fuzz targets one after the other, each for SECONDS (60), with the limits that every target
# must keep, and minimises the inputs that found something new. Stops at the first finding.
#
#   fuzz/run.sh [SECONDS [TARGET...]]
#
# It starts from the seeds in corpus/ and from what earlier runs kept in kept/TARGET.tar.gz, and puts
# the minimised inputs back there.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-60}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list | grep -v '^seeds$')
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for target in "$@"; do
    work=fuzz/work/$target
    kept=fuzz/kept/$target.tar.gz
    mkdir -p "$work" fuzz/kept
    [ ! -f "$kept" ] || tar -xzf "$kept" -C "$work"
    cp "fuzz/corpus/$target"/seed-* "$work"
    echo "== $target: $seconds s from $(date -u +%H:%M:%S)"
    # 512 MiB of our own, and what the address sanitizer adds.
    if ! nice -n 19 cargo +nightly fuzz run "$target" "$work" -- -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=1024 -malloc_limit_mb=512 -print_final_stats=1 -verbosity=0 >"$log" 2>&1; then
        tail -n 60 "$log"
        exit 1
    fi
    grep '^stat::' "$log" | grep -E 'executed|peak|slowest'
    nice -n 19 cargo +nightly fuzz cmin "$target" "$work" >"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
    tar -czf "$kept" -C "$work" .
    echo "kept $(find "$work" -type f | wc -l) inputs, $(stat -c %s "$kept") bytes packed"
done
echo "== done at $(date -u +%H:%M:%S)"
