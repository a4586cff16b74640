# Checks the runner on a live guest, and what it does with bad input. ELSEWHERE has arguments for that, if it is to be checked in
# other hosts, too. ONLY has a text, if only the runner's checks are to be made that have it in what they say. A line for each check,
# `ok: ` or `FAILED: `, goes into the results.
checks() {
    # shellcheck disable=SC2086
    hyperbp-bench check --domain bench ${ONLY:+--only "$ONLY"} $ELSEWHERE ||
        echo "FAILED: the checks ran to their end (exit code $?)"
    [ -z "$ONLY" ] || return

    # expect CODE TEXT ARGUMENTS...: the runner says TEXT in an error of one line, and exits with CODE.
    expect() {
        code=$1 text=$2
        shift 2
        "$@" >/tmp/said 2>&1 </dev/null
        got=$?
        if [ $got -eq "$code" ] && grep -q "^error: .*$text" /tmp/said; then
            echo "ok: exit code $code: $text"
        else
            echo "FAILED: exit code $got, not $code ($text): $(cat /tmp/said)"
        fi
    }
    run="hyperbp-bench run --out /tmp/none --samples 5 --page-samples 1 --domain"
    expect 2 "there is no mechanism \"ept\"" $run bench --mechanism ept
    expect 2 "do not work together" $run bench --mechanism in-place+view-step+data
    expect 2 "invalid value" $run bench --workload nothing
    expect 3 "there is no domain .nobody.: .xl list." $run nobody
    expect 3 "there is no domain .4711." $run 4711
    sed -e 's/^name.*/name = "plain"/' -e 's/^altp2m.*/altp2m = "disabled"/' /guest/guest.cfg >/tmp/plain.cfg
    xl create -q /tmp/plain.cfg
    expect 4 "altp2m=\"external\"" $run plain
    xl destroy plain
    # Nobody, not even root, may open a device on a file system that is mounted with nodev.
    mount -t tmpfs -o nodev none /dev/xen && mknod /dev/xen/privcmd c 10 1
    expect 5 "Permission denied.*as root in dom0" $run bench
    umount /dev/xen
    mv /dev/xen/privcmd /dev/xen/away
    expect 5 "/dev/xen/privcmd" $run bench
    mv /dev/xen/away /dev/xen/privcmd

    # A DRAKVUF that is not there, and one, and a SmartVMI, that cannot attach.
    expect 1 "cannot run /bin/none" $run bench --drakvuf /bin/none
    cat >/tmp/elsewhere <<'ELSEWHERE'
#!/bin/sh
[ "$1" = --backends ] && echo original && exit
echo "nobody is at home" >&2
exit 1
ELSEWHERE
    chmod +x /tmp/elsewhere
    expect 1 "DRAKVUF has ended (exit status: 1): nobody is at home" $run bench --host drakvuf --drakvuf /tmp/elsewhere
    expect 1 "SmartVMI has ended (exit status: 1): nobody is at home" $run bench --host smartvmi --smartvmi /tmp/elsewhere

    # After all of that, the guest is as it was, and the runner's own command line measures in it.
    if hyperbp-bench run --domain bench --machine bochs --out /tmp/after --samples 20 --page-samples 1 >/tmp/table 2>&1; then
        echo "ok: the command line measures a domain by itself"
    else
        echo "FAILED: the command line measures a domain by itself: $(cat /tmp/table)"
    fi
    cat /tmp/table >&2
}
xl create -q /guest/guest.cfg || exit
# Each line is also said when it is there: all of it takes minutes.
checks | tee "$OUT/checks"
