// Which kernel takes how many tokens. Chosen by reasoning about sm_61 (README), not yet by measurement on it.
#pragma once

#include <cstdint>

namespace deepstitch {

struct QuantizedLinearTuning {
    // Up to here every block quantizes x for itself: cheaper than a launch while x is small next to the block's
    // weights.
    int64_t fused_rows = 2;
    // Up to here matrix-vector kernels, eight tokens at a time. Blocks that read the same weights for different tokens
    // stand next to each other, so that the second read is met by the L2 cache.
    int64_t decode_rows = 16;
    // Up to here the flat tile (32 tokens), then the square one (64).
    int64_t flat_rows = 32;
};

}  // namespace deepstitch
