// KVCacheAppend as an IPluginV3 (TensorRT 10 and 11).
#include "../../common/tensorrt/v3.h"

DEEPSTITCH_TENSORRT_CREATOR(kv_cache_append)
