/// A program that uses libhyperbp, in small: whether it can be found, compiled against and linked with.

#include <cstdio>
#include <cstring>

#include <hyperbp/session.hpp>

int main()
{
    hyperbp::ffi::check_mechanism("auto");
    try {
        hyperbp::ffi::open(nullptr, "auto");
    } catch (const rust::Error& error) {
        std::puts(error.what());
        return std::strstr(error.what(), "no hypervisor") != nullptr ? 0 : 1;
    }
    return 1;
}
