#!/bin/sh
# Builds and runs the tests of the seam, for a patched DRAKVUF.
set -eu

if [ $# -ne 1 ] || [ ! -f "$1/config.h" ]; then
    echo "Usage: $(basename "$0") BUILD, the directory in which meson has set up a patched DRAKVUF with hyperbp" >&2
    exit 2
fi
build=$(cd "$1" && pwd)
source=$(sed -n 's/.*"source": "\([^"]*\)".*/\1/p' "$build/meson-info/meson-info.json")
program=$(mktemp -d)
trap 'rm -rf "$program"' EXIT

# What the tests do not reach is not there.
# shellcheck disable=SC2046 # words
"${CC:-cc}" -std=gnu11 -g -O1 -fsanitize=address,undefined -Wall -Wno-unused-parameter -DHAVE_CONFIG_H \
    -I "$build" -I "$source/src" -I "$source" $(pkg-config --cflags glib-2.0 json-c libvmi hyperbp) \
    "$(dirname "$0")/seam.c" "$source/src/libdrakvuf/vmi.c" "$source/src/libdrakvuf/hyperbp.c" \
    -no-pie -Wl,--unresolved-symbols=ignore-all $(pkg-config --libs glib-2.0) -o "$program/seam"
G_SLICE=always-malloc "$program/seam"
