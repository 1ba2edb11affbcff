#!/bin/bash
# Gets of kvfs and perftest's transfers in turn, between the same two devices. Lines: WHAT BYTES MB/S.
set -euo pipefail
bench=$1
perftest() { # PROGRAM BYTES
  local common=(-F -x 1 -s "$2" -t 16 -D 4 -e)
  "$1" "${common[@]}" -d rxe2 >/dev/null 2>&1 &
  local server=$!
  local output
  for ((t = 0; t < 20; t++)); do
    sleep 0.5
    output=$("$1" "${common[@]}" -d rxe0 10.90.0.3 2>&1) && break
  done
  wait $server
  # Bandwidth in MiB/s is the fourth column of the line that begins with the size.
  awk -v what="$1" -v size="$2" '$1 == size { printf "%s %s %.1f\n", what, size, $4 * 1.048576 }' <<<"$output"
}
for size in 65536 1048576; do
  for round in 1 2 3; do
    printf 'kvfs %s %s\n' "$size" "$("$bench" 10.90.0.1 10.90.0.3 "$size" 16 4 | cut -d' ' -f1)"
    perftest ib_write_bw "$size"
    perftest ib_read_bw "$size"
  done
done
