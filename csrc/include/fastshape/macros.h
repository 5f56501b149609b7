// Macros that let host and device compilers share one copy of the maths. No file in this folder includes a torch header.
#pragma once

#if defined(__CUDACC__)
#define FASTSHAPE_HOST_DEVICE __host__ __device__
#else
#define FASTSHAPE_HOST_DEVICE
#endif

// Always inline. The linker keeps only one out-of-line copy of a function, so a file that is compiled for one instruction set
// could otherwise end up with a copy that was compiled for another.
#if defined(__CUDACC__)
#define FASTSHAPE_INLINE __forceinline__
#elif defined(_MSC_VER)
#define FASTSHAPE_INLINE __forceinline
#else
#define FASTSHAPE_INLINE inline __attribute__((always_inline))
#endif

#define FASTSHAPE_FUNCTION FASTSHAPE_HOST_DEVICE FASTSHAPE_INLINE
