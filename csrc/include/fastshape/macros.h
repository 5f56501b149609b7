// What host and device compilers need to share one copy of the maths. No torch headers in this folder.
#pragma once

#if defined(__CUDACC__)
#define FASTSHAPE_HOST_DEVICE __host__ __device__
#else
#define FASTSHAPE_HOST_DEVICE
#endif

// Always inlined, because a file compiled for one instruction set must never lend its copy of a shared
// function to a file compiled for another: the linker keeps only one of two out-of-line copies.
#if defined(__CUDACC__)
#define FASTSHAPE_INLINE __forceinline__
#elif defined(_MSC_VER)
#define FASTSHAPE_INLINE __forceinline
#else
#define FASTSHAPE_INLINE inline __attribute__((always_inline))
#endif

#define FASTSHAPE_FUNCTION FASTSHAPE_HOST_DEVICE FASTSHAPE_INLINE
