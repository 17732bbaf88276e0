// KVCacheAppend as an IPluginV2DynamicExt (TensorRT 8.6).
#include "../../common/tensorrt/v2.h"

DEEPSTITCH_TENSORRT_CREATOR(kv_cache_append)
