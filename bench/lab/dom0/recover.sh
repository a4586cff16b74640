# Kills the runner with SIGKILL in the middle of storms, KILLS times after different times and under different mechanisms,
# recovers the domain each time, and lets the guest finish without a monitor. Then attaches and detaches ATTACH times. A line
# for each goes into the results, `ok: ` or `FAILED: `.
calls=60
mechanisms="auto repair view-step view-fast-step emulate interpret in-place+auto+data in-place+emulate+data
    shadow+auto+view-step shadow+emulate+emulate"
checks() {
    i=0
    while [ $i -lt "$KILLS" ]; do
        for mechanism in $mechanisms; do
            [ $i -lt "$KILLS" ] || break
            i=$((i + 1))
            # From before it has attached to after it has left, in steps that do not fit any period.
            delay=$((20000 + i * 12007 % 300000))
            hyperbp-bench storm --domain bench --count $calls --mechanism "$mechanism" >/tmp/storm 2>&1 </dev/null &
            usleep $delay
            kill -9 $! 2>/dev/null
            wait $!
            code=$?
            what="killed under $mechanism after $((delay / 1000)) ms (exit code $code)"
            # Before anybody has recovered it, no monitor attaches. (One that had not begun yet has left nothing: then this is
            # one storm more.)
            again=""
            if ls /run/hyperbp/*.ledger >/dev/null 2>&1; then
                hyperbp-bench storm --domain bench --count $calls --mechanism auto >/tmp/again 2>&1
                case $? in
                6 | 0) ;;
                *) again="$(cat /tmp/again)" ;;
                esac
            fi
            if [ -z "$again" ] && hyperbp-bench recover --domain bench >/tmp/recovered 2>&1 &&
                hyperbp-bench settle --domain bench --count $calls >/tmp/settled 2>&1; then
                echo "ok: $what, $(grep -c '^- ' /tmp/recovered) things undone"
                # One that has ended by itself, before it was killed, has nothing to complain of.
                [ $code -eq 0 ] || [ $code -eq 137 ] || echo "FAILED: $what: $(tr '\n' ' ' </tmp/storm)"
            else
                echo "FAILED: $what: $again $(cat /tmp/recovered /tmp/settled)"
                xl destroy bench
                xl create -q /tmp/recover.cfg
            fi
            echo "@progress $i $KILLS $what" >&2
        done
    done
    hyperbp-bench check --domain bench --attach "$ATTACH" 2>/tmp/attached ||
        echo "FAILED: attaching and detaching (exit code $?): $(tr '\n' ' ' </tmp/attached)"
    # A domain with nothing to recover.
    hyperbp-bench recover --domain bench | grep -q "nothing to recover" && echo "ok: nothing left to recover"
    faults
}

# Starts a trace, and waits until it counts.
start() {
    hyperbp-bench trace --domain bench --function 0x101000 "$@" >/tmp/traced 2>/tmp/trace.err </dev/null &
    tracer=$!
    until grep -q '^Tracing' /tmp/trace.err; do
        kill -0 $tracer 2>/dev/null || break
        usleep 100000
    done
    begun=$(date +%s)
}
# ended WHAT CODE TEXT: it ends soon, with this exit code, says TEXT, and prints what it has counted.
ended() {
    wait $tracer
    code=$?
    took=$(($(date +%s) - begun))
    if [ $code -eq "$2" ] && [ $took -lt 15 ] && grep -q "$3" /tmp/trace.err && grep -q 0x101000 /tmp/traced; then
        echo "ok: $1: the counts are kept"
    else
        echo "FAILED: $1: exit code $code after $took s: $(cat /tmp/trace.err /tmp/traced | tr '\n' ' ')"
    fi
}
goes_on() {
    if hyperbp-bench storm --domain bench --count $calls --mechanism auto >/tmp/storm 2>&1; then
        echo "ok: $1, and the guest goes on"
    else
        echo "FAILED: $1, and the guest goes on: $(tr '\n' ' ' </tmp/storm)"
    fi
}
# What an operator may do to a domain while a monitor is attached.
faults() {
    start --for 2
    xl pause bench
    ended "a domain that is paused is left" 0 "is paused"
    xl unpause bench
    goes_on "after a pause"

    # Another program's monitor has no ledger. This one is to be like that.
    start
    rm /run/hyperbp/*.ledger
    if hyperbp-bench recover --domain bench >/tmp/recovered 2>&1; then
        echo "FAILED: a live monitor without a ledger is left alone: $(tr '\n' ' ' </tmp/recovered)"
    elif grep -q "lives.*--force" /tmp/recovered; then
        echo "ok: a live monitor without a ledger is left alone"
    else
        echo "FAILED: a live monitor without a ledger is left alone: $(cat /tmp/recovered)"
    fi
    kill -INT $tracer
    ended "a monitor that nobody took the ring from ends" 0 "Tracing"
    goes_on "after a monitor without a ledger"

    # The same, but it has died.
    start
    rm /run/hyperbp/*.ledger
    kill -9 $tracer
    wait $tracer
    if hyperbp-bench recover --domain bench >/tmp/recovered 2>&1 && grep -q "no ledger" /tmp/recovered; then
        echo "ok: a dead monitor without a ledger is recovered from"
    else
        echo "FAILED: a dead monitor without a ledger is recovered from: $(tr '\n' ' ' </tmp/recovered)"
    fi

    start
    xl destroy bench
    ended "a domain that is destroyed is left" 0 "is gone"
}
sed -e 's/^vcpus.*/vcpus = 2/' /guest/guest.cfg >/tmp/recover.cfg
xl create -q /tmp/recover.cfg || exit
checks >"$OUT/checks"
cat "$OUT/checks"
