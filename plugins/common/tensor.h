// What an op is told about a tensor. Free of CUDA and of TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace deepstitch {

// The values are those of nvinfer1::DataType.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kInt32 = 3 };

constexpr int kMaxRank = 8;

struct Shape {
    int32_t rank = 0;
    int64_t dims[kMaxRank] = {};
};

struct Tensor {
    DType dtype = DType::kFloat32;
    Shape shape;
    void* data = nullptr;  // null while shapes are checked
};

// Says which input or attribute is wrong, its value, and what is allowed.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const char* dtype_name(DType dtype);    // "float32"
size_t dtype_bytes(DType dtype);        // of one element
int64_t volume(const Shape& shape);     // number of elements; 1 for rank 0
std::string to_text(const Shape& shape);  // "[2, 3, 64]"
bool operator==(const Shape& left, const Shape& right);
bool operator!=(const Shape& left, const Shape& right);

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << to_text(shape); }
inline std::ostream& operator<<(std::ostream& out, DType dtype) { return out << dtype_name(dtype); }

// concat("x has rank ", 3) == "x has rank 3"
template <class... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (void)(out << ... << parts);
    return out.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    throw Refusal(concat(parts...));
}

// require(k <= experts, "top_k is ", k, ", but there are ", experts, " experts")
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) refuse(parts...);
}

}  // namespace deepstitch
