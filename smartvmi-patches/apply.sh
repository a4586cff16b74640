#!/bin/sh
# Applies the patches beside this script to a tree of what they are for: see cpp-shim/patches/apply.sh.
set -eu
unset CDPATH
HYPERBP_PATCHES=$(cd -- "$(dirname -- "$0")" && pwd -P)
export HYPERBP_PATCHES
exec sh "$HYPERBP_PATCHES/../cpp-shim/patches/apply.sh" "$@"
