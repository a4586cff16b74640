# Creates the benchmark guest and runs each line of RUNS, the arguments of one `hyperbp-bench run`, against it.
xl create -q /guest/guest.cfg || exit
n=0
# Not in a pipe, so that a failure can leave the script.
while read -r arguments; do
    # The arguments are words of ours without any special characters, and are to be split.
    # shellcheck disable=SC2086
    hyperbp-bench run --domain bench --machine bochs --out "$OUT/$n" --progress lines $arguments </dev/null || exit
    n=$((n + 1))
done <<RUNS
$RUNS
RUNS
