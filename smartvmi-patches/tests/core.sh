#!/bin/sh
# Builds and runs the tests of a patched SmartVMI's supervisor over hyperbp itself, and of its caches.
set -eu

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ ! -f "$1/compile_commands.json" ]; then
    echo "Usage: $(basename "$0") BUILD [PLUGIN], the directories in which CMake has set up a patched vmicore with" \
        "hyperbp, and has built plugins/hyperbp" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd -P)
build=$(cd "$1" && pwd)
source=$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' "$build/CMakeCache.txt")
program=$(mktemp -d)
trap 'rm -rf "$program"' EXIT

flags="-g -O1 -fsanitize=address,undefined -Wall -Wextra -Wno-missing-field-initializers"
defined="-DVMICORE_HYPERBP -DYAML_CPP_SUPPORT"
tests=core
libraries="-lgmock_main -lgmock -lgtest -lfmt $(pkg-config --libs yaml-cpp)"
if [ $# -eq 2 ]; then
    tests="core plugin"
    defined="$defined $(pkg-config --cflags jsoncpp)"
    libraries="$libraries $(pkg-config --libs jsoncpp)"
    HYPERBP_PLUGIN_DIRECTORY=$(cd "$2/src" && pwd)
    export HYPERBP_PLUGIN_DIRECTORY
fi
vmicore=$(grep -o -e '-isystem [^ ]*' -e '-I[^ ]*' "$build/compile_commands.json" | sort -u)
# What is at hand for the functions of LibVMI is ours, and so is what else hyperbp is linked with.
hyperbp=$(pkg-config --libs hyperbp | sed -e 's/-lvmi//' -e 's/-lglib-2.0//')
# shellcheck disable=SC2046,SC2086 # words
{
    for file in "$here/guest.cpp" "$here/../../cpp-shim/tests/fake/libvmi.cpp" \
        "$here/../../cpp-shim/tests/fake/machine.cpp"; do
        "${CXX:-c++}" -std=c++17 $flags $(pkg-config --cflags hyperbp) -c "$file" \
            -o "$program/our-$(basename "$file").o"
    done
    for file in src/lib/vmi/HyperbpEventSupervisor src/lib/vmi/Breakpoint src/lib/vmi/Event src/lib/GlobalControl \
        src/lib/plugins/PluginSystem src/lib/vmi/MemoryMapping; do
        "${CXX:-c++}" -std=c++20 $flags $defined $vmicore -c "$source/$file.cpp" \
            -o "$program/$(basename "$file").o"
    done
    for file in $tests; do
        "${CXX:-c++}" -std=c++20 $flags $defined -I "$source/src/lib" -I "$source/src/include" -I "$source/test" \
            -I "$source/test/include" $vmicore -c "$here/$file.cpp" -o "$program/$file.o"
    done
    # As vmicore itself is linked.
    "${CXX:-c++}" -fsanitize=address,undefined -Wl,--export-dynamic-symbol=vmicore_hyperbp_figures_1 "$program"/*.o \
        $libraries $hyperbp -o "$program/core"
}
"$program/core" --gtest_brief=1

# LibVMI's functions are in the test; what it does not reach is not there.
for file in "$source/src/lib/vmi/LibvmiInterface.cpp" "$here/caches.cpp"; do
    # shellcheck disable=SC2086 # words
    "${CXX:-c++}" -std=c++20 $flags $defined -I "$source/src/lib" -I "$source/src/include" -I "$source/test" \
        -I "$source/test/include" $vmicore -c "$file" -o "$program/$(basename "$file").caches"
done
"${CXX:-c++}" -fsanitize=address,undefined -no-pie -Wl,--unresolved-symbols=ignore-all "$program"/*.caches \
    -lgmock_main -lgmock -lgtest -lfmt -o "$program/caches"
"$program/caches" --gtest_brief=1
