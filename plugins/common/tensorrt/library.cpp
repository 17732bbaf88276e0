// What TensorRT's registry looks for when it loads this library: setLoggerFinder and a list of creators. Nothing
// registers itself: a library that does both leaves creators behind that are gone when it is unloaded.
#include <atomic>
#include <cstdio>

#include "../op_list.h"
#include "adapter.h"

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorInterface;
#define DEEPSTITCH_LIST_CREATORS getCreators
#else
using Creator = nvinfer1::IPluginCreator;
#define DEEPSTITCH_LIST_CREATORS getPluginCreators
#endif

namespace deepstitch {
namespace tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

}  // namespace

// Each is defined in tensorrt/v2.cpp or v3.cpp of its folder.
#define DEEPSTITCH_OP(folder) Creator* folder##_creator();
DEEPSTITCH_OPS
#undef DEEPSTITCH_OP

void report_error(const char* op, const char* where, const char* message) noexcept {
    char text[1024];
    std::snprintf(text, sizeof text, "deepstitch %s, %s: %s", op, where, message);
    nvinfer1::ILoggerFinder* const lent = finder.load();
    nvinfer1::ILogger* const logger = lent == nullptr ? nullptr : lent->findLogger();
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

}  // namespace tensorrt
}  // namespace deepstitch

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* lent) {
    deepstitch::tensorrt::finder.store(lent);
}

__attribute__((visibility("default"))) Creator* const* DEEPSTITCH_LIST_CREATORS(int32_t& count) {
    using namespace deepstitch::tensorrt;
#define DEEPSTITCH_OP(folder) folder##_creator(),
    static Creator* const creators[] = {DEEPSTITCH_OPS};
#undef DEEPSTITCH_OP
    count = static_cast<int32_t>(sizeof creators / sizeof creators[0]);
    return creators;
}

}
