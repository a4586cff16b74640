# A hostile guest with so many vCPUs as VCPUS lists. HOSTILE has the arguments of `hyperbp-bench hostile`. Each leaves its
# hostile.json in a directory named after the number. What the guest finds is in there, and no failure of this script.
for vcpus in $VCPUS; do
    sed -e "s/^vcpus.*/vcpus = $vcpus/" /guest/guest.cfg >/tmp/hostile.cfg
    xl create -q /tmp/hostile.cfg || exit
    mkdir -p "$OUT/$vcpus"
    # The arguments are words of ours without any special characters, and are to be split.
    # shellcheck disable=SC2086
    hyperbp-bench hostile --domain bench --config /tmp/hostile.cfg --progress lines --out "$OUT/$vcpus" $HOSTILE </dev/null
    [ -s "$OUT/$vcpus/hostile.json" ] || exit 1
    xl destroy bench
done
