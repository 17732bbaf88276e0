// Stored matrices on the host: attributes, checks, workspace and launches that the ops with such inputs share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "linear.h"
#include "op.h"

namespace deepstitch {

inline LinearFormat parse_linear_format(const std::string& text) {
    if (text == "float32") return LinearFormat::kFloat32;
    if (text == "float16") return LinearFormat::kFloat16;
    if (text == "int8") return LinearFormat::kInt8;
    if (text == "int4") return LinearFormat::kInt4;
    refuse("weight_format is '", text, "'; it must be float32, float16, int8 or int4");
}

inline const char* linear_format_name(LinearFormat format) {
    static constexpr const char* kNames[] = {"float32", "float16", "int8", "int4"};
    return kNames[static_cast<int>(format)];
}

inline int32_t check_block_size(LinearFormat format, int64_t block_size) {
    if (!linear_is_integer(format)) {
        require(block_size == 0, "block_size is ", block_size, ", but ", linear_format_name(format),
                " weights have no blocks; leave it out or set it to 0");
    } else {
        require(block_size == 32 || block_size == 64 || block_size == 128, "block_size is ", block_size, "; ",
                linear_format_name(format), " weights are stored in blocks of 32, 64 or 128");
    }
    return static_cast<int32_t>(block_size);
}

// An attribute that is a size.
inline int32_t check_extent(const char* name, int64_t value, int64_t largest) {
    require(value >= 1 && value <= largest, name, " is ", value, "; it must be 1 to ", largest);
    return static_cast<int32_t>(value);
}

// dtypes of the inputs of one matrix, in order: numbers and, for integer formats, scales.
inline void add_matrix_inputs(std::vector<TensorSpec>& specs, LinearFormat format, const char* name,
                              const char* scales) {
    if (linear_is_integer(format)) {
        specs.push_back({name, {DType::kInt32}});
        specs.push_back({scales, {DType::kFloat32, DType::kFloat16}});
    } else {
        specs.push_back({name, {format == LinearFormat::kFloat16 ? DType::kFloat16 : DType::kFloat32}});
    }
}

// K: what a row of activations and of weights has in common.
inline void check_inner(const char* what, int64_t inner, LinearFormat format, int32_t block_size) {
    require(inner > 0 && inner % kLinearGroup == 0, what, " is ", inner, "; it must be a positive multiple of ",
            kLinearGroup);
    require(inner <= (1 << 18), what, " is ", inner, "; it must be at most ", 1 << 18);
    if (linear_is_integer(format))
        require(inner % block_size == 0, what, " is ", inner, ", which block_size ", block_size,
                " does not divide; quantize with a block size that does");
}

// Kernels count a matrix in 16-byte units with 32 bits.
inline void check_size(const char* what, int64_t rows, int64_t inner, int64_t bits) {
    require(rows * inner / 8 * bits <= int64_t(1) << 36, what, " of ", rows, " x ", inner, " is larger than 64 GB");
}

// weight [leading..., K in words] and its scales [leading..., K / block_size]. `leading` says what the first axes must
// be.
inline void check_matrix(const std::vector<Tensor>& inputs, int index, const char* name, const char* scales_name,
                         LinearFormat format, int32_t block_size, const std::vector<int64_t>& leading, int64_t inner) {
    check_size(name, leading.back(), inner, linear_bytes(format, 8));
    const int per_word = format == LinearFormat::kInt4 ? 8 : format == LinearFormat::kInt8 ? 4 : 1;
    const auto expect = [&](const Tensor& tensor, const char* what, int64_t last, const char* remark) {
        Shape shape;
        shape.rank = static_cast<int32_t>(leading.size()) + 1;
        std::copy(leading.begin(), leading.end(), shape.dims);
        shape.dims[leading.size()] = last;
        require(tensor.shape == shape, what, " has shape ", tensor.shape, "; it must be ", shape, remark);
    };
    const char* remark = per_word == 8   ? ": eight int4 weights in an int32"
                         : per_word == 4 ? ": four int8 weights in an int32"
                                         : "";
    expect(inputs[index], name, inner / per_word, remark);
    if (linear_is_integer(format)) expect(inputs[index + 1], scales_name, inner / block_size, ": one scale a block");
}

inline LinearMatrix linear_matrix(const std::vector<Tensor>& inputs, int index, LinearFormat format, int64_t outputs,
                                  int64_t inner, int32_t block_size) {
    LinearMatrix matrix = {};
    matrix.data = inputs[index].data;
    matrix.outputs = static_cast<int32_t>(outputs);
    matrix.inputs = static_cast<int32_t>(inner);
    matrix.block_size = block_size;
    if (linear_is_integer(format)) {
        matrix.scales = inputs[index + 1].data;
        matrix.half_scales = inputs[index + 1].dtype == DType::kFloat16 ? 1 : 0;
    }
    return matrix;
}

// Hands out pieces of the workspace, each aligned to 256 bytes. With a null base it only counts.
class Pieces {
public:
    explicit Pieces(void* base) : base_(static_cast<unsigned char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        unsigned char* at = base_ == nullptr ? nullptr : base_ + bytes_;
        bytes_ += (static_cast<size_t>(std::max<int64_t>(count, 0)) * sizeof(T) + 255) / 256 * 256;
        return reinterpret_cast<T*>(at);
    }
    size_t bytes() const { return bytes_; }

private:
    unsigned char* base_;
    size_t bytes_ = 0;
};

inline uint32_t blocks_for(int64_t count, int64_t each) {
    return static_cast<uint32_t>((count + each - 1) / each);
}

template <class Params>
void launch(Launcher& launcher, const std::string& kernel, Launcher::Dim3 grid, uint32_t threads,
            const Params& params) {
    Launcher::Dim3 block;
    block.x = threads;
    launcher.launch(kernel.c_str(), grid, block, 0, &params, sizeof(Params));
}

// A warp for each 128 numbers.
inline void launch_quantize(Launcher& launcher, const std::string& kernel, const LinearQuantizeParams& params) {
    Launcher::Dim3 grid;
    grid.x = blocks_for(params.rows * blocks_for(params.columns, 128), 8);
    launch(launcher, kernel, grid, 256, params);
}

}  // namespace deepstitch
