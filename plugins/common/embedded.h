// The machine code inside this library: one fatbin per op, put there by the build (see plugins/build/library.py).
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace deepstitch {

struct EmbeddedCode {
    const char* op;  // the folder's name, with which the names of its kernels begin
    const void* data;
    size_t bytes;
};

// embedded.cpp
const std::vector<EmbeddedCode>& embedded_code();
const std::vector<std::string>& embedded_targets();  // "sm_61", "compute_61"

}  // namespace deepstitch
