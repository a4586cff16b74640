# Storms in guests with so many virtual CPUs as VCPUS lists. STORM has the arguments of `hyperbp-bench storm`, and ELSEWHERE has
# more if they rage in another host. Each leaves its storm.json and the table in a directory named after the number.
result=0
for vcpus in $VCPUS; do
    sed -e "s/^vcpus.*/vcpus = $vcpus/" /guest/guest.cfg >/tmp/storm.cfg
    xl create -q /tmp/storm.cfg || exit
    mkdir -p "$OUT/$vcpus"
    # The arguments are words of ours without any special characters, and are to be split.
    # shellcheck disable=SC2086
    hyperbp-bench storm --domain bench --progress lines --out "$OUT/$vcpus" $STORM $ELSEWHERE </dev/null || result=$?
    xl destroy bench
done
[ $result -eq 0 ]
