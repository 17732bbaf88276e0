// Which regime takes which load. Chosen by reasoning about sm_61 (README), not yet by measurement on it.
#pragma once

#include <cstdint>

namespace deepstitch {

struct MoEExpertsTuning {
    // Up to here one block routes and sorts all tokens (at most kMoEPlannedTokens): one launch instead of three.
    int64_t planned_tokens = 32;
    // Up to here always the matrix-vector kernels.
    int64_t decode_tokens = 8;
    // Up to so many slots an expert on average, tiles of eight slots on the matrix-vector kernels, whose time is that
    // of the weights. A tile of 32 tokens with four of them used would spend seven eighths of its arithmetic on
    // nothing.
    int64_t decode_slots_of_expert = 4;
    // From here the square tile (64 slots), below the flat one (32).
    int64_t square_slots_of_expert = 64;
    // Tokens worked on at a time: bounds the workspace. Larger inputs go by in such pieces.
    int64_t chunk_tokens = 2048;
};

}  // namespace deepstitch
