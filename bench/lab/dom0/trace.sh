# Traces functions of the Linux guest while it works for so many of its SECONDS. TRACE has the arguments of `hyperbp-bench
# trace`. What is to be compared goes into the results, and a line for each check that is made here, `ok: ` or `FAILED: `.
sed -e "s/^vcpus.*/vcpus = $VCPUS/" /guest/linux.cfg >/tmp/linux.cfg
xl create -q /tmp/linux.cfg || exit

# The guest's console, in a file and from a pipe that stays open. (`xl console` reads only from a terminal.)
console=$OUT/console
domain=$(xl domid linux)
mkfifo /tmp/to-guest
xenconsole --interactive --type pv --num 0 "$domain" </tmp/to-guest >"$console" &
exec 3>/tmp/to-guest

# until_said LINE: waits until the guest has said so, and tells how far it is.
until_said() {
    told=
    until grep -q "^$1" "$console"; do
        sleep 5
        if [ "$(xl domid linux 2>&1)" != "$domain" ]; then
            echo "the guest is gone before it said \"$1\""
            return 1
        fi
        # It stays where it is then.
        if grep -q "Kernel panic" "$console"; then
            grep '^\[' "$console"
            echo "the guest's kernel has panicked before it said \"$1\""
            return 1
        fi
        round=$(grep '^round ' "$console" | tail -n 1 | tr -d '\r')
        [ "$round" = "$told" ] || echo "@progress ${round##* } $SECONDS $round s"
        told=$round
    done
}
until_said ready || exit

# Guest and dom0 have the same kernel, and neither has moved it.
cat /proc/kallsyms >/tmp/symbols
# The arguments are words of ours without any special characters, and are to be split.
# shellcheck disable=SC2086
hyperbp-bench trace --domain linux --symbols /tmp/symbols --json "$OUT/trace.json" $TRACE \
    >"$OUT/table" 2>/tmp/trace.err </dev/null &
tracer=$!
echo "@progress 0 $SECONDS attaching"
until grep -q '^Tracing' /tmp/trace.err; do
    if ! kill -0 $tracer 2>/dev/null; then
        cat /tmp/trace.err
        exit 1
    fi
    sleep 1
done
echo "$SECONDS" >&3
until_said 'done' || exit
wait $tracer
code=$?
{
    if [ $code -eq 0 ]; then
        echo "ok: the tracer ended when the guest's work did"
    else
        echo "FAILED: the tracer ended when the guest's work did (exit code $code): $(tail -n 1 /tmp/trace.err)"
    fi
    if hyperbp-bench recover --domain linux | grep -q "nothing to recover"; then
        echo "ok: nothing was left to recover"
    else
        echo "FAILED: something was left to recover"
    fi
} >"$OUT/checks"
cat "$OUT/table"
xl destroy linux
