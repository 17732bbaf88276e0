// The ops of a library: DEEPSTITCH_OP(folder) for each. A build of some of them only defines DEEPSTITCH_OPS itself.
#pragma once

#if !defined(DEEPSTITCH_OPS)
#define DEEPSTITCH_OPS              \
    DEEPSTITCH_OP(moe_experts)      \
    DEEPSTITCH_OP(sparse_attention) \
    DEEPSTITCH_OP(quantized_linear) \
    DEEPSTITCH_OP(rms_norm_rope)    \
    DEEPSTITCH_OP(deepstack_add)    \
    DEEPSTITCH_OP(kv_cache_append)
#endif
