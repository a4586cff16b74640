# Checks what the monitor does to memory, views and limits that are not its own, in domains of several kinds. A line for each
# check, `ok: ` or `FAILED: `, goes into the results.

# domain NAME SED...: a benchmark guest with this name and another configuration.
domain() {
    name=$1
    shift
    sed -e "s/^name.*/name = \"$name\"/" "$@" /guest/guest.cfg >"/tmp/$name.cfg"
    xl create -q "/tmp/$name.cfg" >/tmp/created 2>&1 && return
    echo "FAILED: domain $name cannot be created: $(tr '\n' ' ' </tmp/created)"
    return 1
}

# check NAME ARGUMENTS...: the runner finds everything right.
check() {
    name=$1
    shift
    hyperbp-bench check-domain --domain "$name" "$@" >/tmp/said 2>/tmp/failed </dev/null ||
        echo "FAILED: $name: $* (exit code $?): $(tr '\n' ' ' </tmp/failed)"
    cat /tmp/said
}

# expect CODE TEXT ARGUMENTS...: the runner says TEXT in an error of one line, and exits with CODE.
expect() {
    code=$1 text=$2
    shift 2
    hyperbp-bench "$@" >/tmp/said 2>&1 </dev/null
    got=$?
    if [ $got -eq "$code" ] && grep -q "^error: .*$text" /tmp/said; then
        echo "ok: exit code $code: $(grep '^error: ' /tmp/said)"
    else
        echo "FAILED: exit code $got, not $code ($text): $(cat /tmp/said)"
    fi
}

# Guests of several GiB. The machine has less, and xl refuses altp2m with populate on demand. So they get a page of RAM here and
# there, as a guest of that size has it all over: at 0xf0000000 from 4 GiB on.
sizes() {
    for gib in 3 4 6; do
        ram="--ram 0x8000 --ram 0xbffff"
        [ $gib -lt 4 ] || ram="$ram --ram 0xf0000 --ram 0xf0001 --ram 0xf0002 --ram 0xfbfff"
        [ $gib -lt 6 ] || ram="$ram --ram 0x100000 --ram 0x17ffff"
        domain "gib$gib" || continue
        # The arguments are words of ours without any special characters, and are to be split.
        # shellcheck disable=SC2086
        check "gib$gib" memory $ram
        xl destroy "gib$gib"
    done
}

limits() {
    domain plain || return
    check plain memory --ram 0x1000 --ram 0x1fff
    check plain views
    check plain limit
    check plain pages --pages 1000
    # A guest that has just what the host had left: the monitor needs 4 MiB.
    left=$(xl info free_memory)
    # It also needs some for itself.
    until sed -e 's/^name.*/name = "full"/' -e "s/^memory.*/memory = $left/" /guest/guest.cfg >/tmp/full.cfg &&
        xl create -q /tmp/full.cfg >/tmp/created 2>&1; do
        left=$((left - 1))
    done
    expect 1 "the host has no memory left" check-domain --domain plain insert --pages 1500
    xl destroy full
    check plain insert --pages 1500
    xl destroy plain

    # The least memory for page tables, and breakpoints that need as many page tables as there can be.
    domain tables -e 's/^memory.*/memory = 190\nshadow_memory = 1/' && {
        expect 1 "put shadow_memory=MiB with more into its configuration" check-domain --domain tables insert --pages 85 --stride 512
        check tables insert --pages 1
        xl destroy tables
    }
}

# The guest could switch views itself.
modes() {
    for mode in mixed limited; do
        domain $mode -e "s/^altp2m.*/altp2m = \"$mode\"/" || continue
        expect 4 "altp2m=\"$mode\".*put altp2m=\"external\"" check-domain --domain $mode insert --pages 1
        check $mode --allow-guest-altp2m insert --pages 1
        xl destroy $mode
    done
}

# Writes to pages that are no plain RAM, and an INT3 that Xen does not deliver.
writes() {
    domain writes || return
    check writes rom
    check writes log-dirty
    check writes refused-injection
    xl destroy writes
}

# Domains that end while they are traced.
crashes() {
    for what in crash triple-fault; do
        domain $what -e 's/^on_crash.*/on_crash = "preserve"\non_reboot = "preserve"/' || continue
        check $what $what
        xl destroy $what
    done
}

# Domains that are saved while they are traced. The guest must run when it is restored.
saves() {
    domain saved || return
    check saved save-and-resume --mechanism repair --image /tmp/image
    xl destroy saved
    if xl restore /tmp/image >/tmp/restored 2>&1; then
        check saved insert --pages 1
    else
        echo "FAILED: the image cannot be restored: $(tr '\n' ' ' </tmp/restored)"
        domain saved || return
    fi
    check saved save --mechanism auto --image /tmp/image
    xl destroy saved 2>/dev/null
    rm -f /tmp/image
}

# Each line is also said when it is there.
for part in ${PARTS:-sizes limits modes writes crashes saves}; do $part; done | tee "$OUT/checks"
