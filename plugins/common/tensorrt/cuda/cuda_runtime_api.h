// In place of CUDA's header of this name, of which TensorRT's headers use these two names only. With it, an adapter
// compiles where no CUDA toolkit is.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
