// What the kernels of quantized_linear are launched with.
#pragma once

#include "../common/linear.h"

namespace deepstitch {

struct QuantizedLinearParams {
    const float* x;  // [rows, matrix.inputs]
    LinearMatrix matrix;
    const float* bias;      // [outputs] or null
    const float* residual;  // [rows, outputs] or null
    float* y;               // [rows, outputs]
    const void* units;      // of x, quantized; null where the kernel quantizes, and for float formats
    const LinearMeta* meta;
    int32_t rows;
};

}  // namespace deepstitch
