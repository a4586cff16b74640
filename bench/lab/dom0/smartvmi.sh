# Has the Linux guest's two processes that share a page of code work through ROUNDS with each of PASSES, one after the other:
# `before` and `after` without any monitor, `original` and `hyperbp` with a vmicore whose PLUGIN has set a breakpoint in one of
# them, by SmartVMI's own means or with hyperbp's MECHANISM. What the guest has said is in `console` of the results then, what
# vmicore has in a directory with the name of the pass, and so is its exit code, and whether it was there to the end: `ended`.
#
# nopcid: SmartVMI's own breakpoints know a process by the whole of CR3, which has the number of an address space in it else. The
# weight is the benchmark guest's: on one CPU, dom0 is never to give way.
sed -e 's/rdinit=[^ ]*/rdinit=\/pair nopcid/' /guest/linux.cfg >/tmp/linux.cfg
echo "cpu_weight = 1" >>/tmp/linux.cfg
xl create -q /tmp/linux.cfg || exit

# The guest's console, in a file and from a pipe that stays open. (`xl console` reads only from a terminal.)
console=$OUT/console
domain=$(xl domid linux)
mkfifo /tmp/to-guest
xenconsole --interactive --type pv --num 0 "$domain" </tmp/to-guest >"$console" &
exec 3>/tmp/to-guest

# until_said LINE: waits until the guest has said so.
until_said() {
    until grep -q "^$1" "$console"; do
        sleep 2
        if [ "$(xl domid linux 2>&1)" != "$domain" ]; then
            echo "the guest is gone before it said \"$1\""
            exit 1
        fi
    done
}

runs() { kill -0 $vmicore 2>/dev/null; }
is_paused() { xl list "$domain" | grep -q ' [-rb]*p[-sc]* '; }

# start PASS: starts vmicore, and waits until the breakpoint is set and the guest goes on, or it is clear that neither will be.
start() {
    mkdir "$OUT/$1"
    cat >/tmp/vmicore.yml <<CONFIGURATION
results_directory: $OUT/$1
log_level: info
vm:
  name: linux
  offsets_file: /profile.json
plugin_system:
  directory: /bin
  plugins:
    $PLUGIN:
      process: pair-a
      address: $address
CONFIGURATION
    if [ "$1" = hyperbp ]; then
        echo "breakpoints: {backend: hyperbp, mechanism: $MECHANISM}" >>/tmp/vmicore.yml
    fi
    vmicore -c /tmp/vmicore.yml >"$OUT/$1/log" 2>"$OUT/$1/errors" </dev/null &
    vmicore=$!
    while runs && ! grep -q 'Breakpoint is set\|Unable to set the breakpoint\|The plugin does nothing' "$OUT/$1/log"; do
        sleep 1
    done
    while runs && is_paused; do sleep 1; done
}

# stop PASS
stop() {
    end=early
    if runs; then
        end=late
        kill -INT $vmicore
    fi
    wait $vmicore
    echo "$? $end" >"$OUT/$1/ended"
}

until_said ready
address=$(sed -n 's/^page a \(0x[0-9a-f]*\) .*/\1/p' "$console")
done=0
all=$(echo "$PASSES" | wc -w)
for pass in $PASSES; do
    case $pass in
    before | after) echo "@progress $done $all $pass" ;;
    *)
        echo "@progress $done $all $pass: vmicore reads its profile"
        start "$pass"
        echo "@progress $done $all $pass"
        ;;
    esac
    echo "$pass $ROUNDS" >&3
    until_said "end $pass"
    case $pass in
    before | after) ;;
    *) stop "$pass" ;;
    esac
    done=$((done + 1))
done
xl list
xl destroy linux
