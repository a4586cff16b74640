# Creates the benchmark guest, or in GUEST=linux the Linux guest with the benchmark's program, and runs each line of RUNS, the
# arguments of one `hyperbp-bench run`, against it.
domain=bench
if [ "$GUEST" = linux ]; then
    domain=linux
    # As little memory as it does with, for all of it is looked through, and the weight for the reason that is in guest.cfg.
    sed -e 's/rdinit=[^ ]*/rdinit=\/program/' -e 's/^memory.*/memory = 128/' /guest/linux.cfg >/tmp/linux.cfg
    echo "cpu_weight = 1" >>/tmp/linux.cfg
    xl create -q /tmp/linux.cfg || exit
    # Its console, in a file and from a pipe that stays open. (`xl console` reads only from a terminal.)
    mkfifo /tmp/to-guest
    xenconsole --interactive --type pv --num 0 "$(xl domid linux)" </tmp/to-guest >/tmp/console &
    exec 3>/tmp/to-guest
    until grep -q '^ready' /tmp/console; do
        sleep 1
        if grep '^the program has ended' /tmp/console || ! xl domid linux >/dev/null; then
            cat /tmp/console
            exit 1
        fi
    done
else
    xl create -q /guest/guest.cfg || exit
fi
# For DRAKVUF.
[ ! -f /profile.json ] || export PROFILE=/profile.json
n=0
# Not in a pipe, so that a failure can leave the script.
while read -r arguments; do
    # The arguments are words of ours without any special characters, and are to be split.
    # shellcheck disable=SC2086
    hyperbp-bench run --domain $domain --machine bochs --out "$OUT/$n" --progress lines $arguments </dev/null || exit
    n=$((n + 1))
done <<RUNS
$RUNS
RUNS
