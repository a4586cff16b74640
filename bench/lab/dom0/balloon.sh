# Has guests with VCPUS virtual CPUs, one after the other, give pages back to Xen and get others in their place ROUNDS times under
# each mechanism. A line for each goes into the results, `ok: ` or `FAILED: `.
checks() {
    for vcpus in $VCPUS; do
        sed -e "s/^vcpus.*/vcpus = $vcpus/" /guest/guest.cfg >/tmp/balloon.cfg
        xl create -q /tmp/balloon.cfg || exit
        echo "@progress 0 1 $vcpus virtual CPUs" >&2
        hyperbp-bench check --domain bench --balloon "$ROUNDS" 2>/tmp/said ||
            echo "FAILED: ballooning with $vcpus virtual CPUs (exit code $?): $(tr '\n' ' ' </tmp/said)"
        cat /tmp/said >&2
        xl destroy bench
    done
}
checks >"$OUT/checks"
cat "$OUT/checks"
