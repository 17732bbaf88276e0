// RMSNormRope as an IPluginV3 (TensorRT 10 and 11).
#include "../../common/tensorrt/v3.h"

DEEPSTITCH_TENSORRT_CREATOR(rms_norm_rope)
