// The argument of every kernel of deepstack_add.
#pragma once

#include "../common/types.h"

namespace deepstitch {

constexpr int kDeepStackThreads = 128;

struct DeepStackAddParams {
    const void* hidden;    // [tokens, width]
    const void* embeds;    // [rows, stride]
    const int32_t* index;  // [tokens]
    void* output;          // [tokens, width]
    int64_t rows;
    int64_t stride;  // elements from one row of embeds to the next
    int64_t begin;   // of this layer's columns in a row of embeds
    int32_t width;
};

}  // namespace deepstitch
