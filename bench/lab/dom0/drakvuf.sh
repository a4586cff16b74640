# Runs DRAKVUF, with the arguments in DRAKVUF and HYPERBP, on the Linux guest while it works through its ROUNDS. What DRAKVUF prints is in
# `events` and `messages` of the results then, what the guest has said in `console`, and in `ended` DRAKVUF's exit code and
# whether it was there to the end.
sed -e 's/rdinit=[^ ]*/rdinit=\/rounds norandmaps/' /guest/linux.cfg >/tmp/linux.cfg
xl create -q /tmp/linux.cfg || exit

# The guest's console, in a file and from a pipe that stays open. (`xl console` reads only from a terminal.)
console=$OUT/console
domain=$(xl domid linux)
mkfifo /tmp/to-guest
xenconsole --interactive --type pv --num 0 "$domain" </tmp/to-guest >"$console" &
exec 3>/tmp/to-guest
until grep -q '^ready' "$console"; do sleep 1; done

# What is only known late: up to here, the machine does the same whatever that is.
dd if=/dev/mem bs=2048 skip=$((0xd0000 / 2048)) count=1 of=/tmp/late 2>/dev/null && . /tmp/late || exit
# The arguments are words without any special characters, and are to be split.
# shellcheck disable=SC2086
env $ENVIRONMENT drakvuf -r /profile.json -d "$domain" -o json $DRAKVUF $HYPERBP >"$OUT/events" 2>"$OUT/messages" </dev/null &
drakvuf=$!
runs() { kill -0 $drakvuf 2>/dev/null; }
is_paused() { xl list "$domain" | grep -q ' [-rb]*p[-sc]* '; }
# It pauses the guest until everything is set.
echo "@progress 0 $ROUNDS DRAKVUF reads its profile"
while runs && ! is_paused; do sleep 1; done
while runs && is_paused; do sleep 1; done

echo "$ROUNDS" >&3
told=
until grep -q '^done' "$console"; do
    sleep 1
    if [ "$(xl domid linux 2>&1)" != "$domain" ]; then
        echo "the guest is gone before it was done"
        exit 1
    fi
    round=$(grep '^round ' "$console" | tail -n 1 | cut -d ' ' -f 2)
    [ "$round" = "$told" ] || echo "@progress ${round:-0} $ROUNDS rounds of work, and $(wc -l <"$OUT/events") events"
    told=$round
done
# What has happened by now is still reported.
sleep 3
end=early
if runs; then
    end=late
    kill -INT $drakvuf
fi
wait $drakvuf
echo "$? $end" >"$OUT/ended"
tail -n 5 "$OUT/messages"
xl list
xl destroy linux
