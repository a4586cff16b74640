# Measures what waiting takes, for SECONDS each. What is wrong is in waiting.json, too.
xl create -q /guest/guest.cfg || exit
hyperbp-bench waiting --domain bench --seconds "$SECONDS" --progress lines --out "$OUT" </dev/null
[ -s "$OUT/waiting.json" ]
