// Fixed-width integers for parameter structs and kernels, under NVRTC (which has no <stdint.h>) as well.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <stddef.h>
#include <stdint.h>
#endif
