#!/bin/sh
# Writes the patches beside this script anew: see cpp-shim/patches/regenerate.sh.
set -eu
unset CDPATH
HYPERBP_PATCHES=$(cd -- "$(dirname -- "$0")" && pwd -P)
export HYPERBP_PATCHES
exec sh "$HYPERBP_PATCHES/../cpp-shim/patches/regenerate.sh" "$@"
