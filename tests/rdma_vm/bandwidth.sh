#!/bin/bash
# bandwidth.sh BENCH [ROUNDS]: gets of kvfs and perftest's transfers in turn, between the same two devices. Lines: WHAT BYTES MB/S.
set -euo pipefail
bench=$1 rounds=${2:-3}
perftest() { # PROGRAM BYTES ITERATIONS
  local options=(-F -x 1 -s "$2" -t 16 -n "$3")
  [[ $1 == ib_write_bw ]] || options+=(-o 16 -e) # of the two it alone can sleep until something is done, as kvfs does
  "$1" "${options[@]}" -d rxe2 >/dev/null 2>&1 &
  local server=$! output=
  for ((t = 0; t < 20; t++)); do
    sleep 1
    if output=$("$1" "${options[@]}" -d rxe0 10.90.0.3 2>&1); then break; fi
  done
  wait $server
  # The average in MiB/s is the fourth column of the line that begins with the size.
  awk -v what="$1" -v size="$2" '$1 == size { printf "%s %s %.1f\n", what, size, $4 * 1.048576 }' <<<"$output"
}
for size in 65536 1048576; do
  for ((round = 0; round < rounds; round++)); do
    printf 'kvfs %s %s\n' "$size" "$("$bench" 10.90.0.1 10.90.0.3 "$size" 16 4 | cut -d' ' -f1)"
    perftest ib_write_bw "$size" $((26214400 / size))
    perftest ib_read_bw "$size" $((26214400 / size))
  done
done
