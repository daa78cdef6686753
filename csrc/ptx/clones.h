// A function compiled for several instruction sets, of which the loader takes the best that the processor has.
#pragma once
#include <cstdint>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PTX_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define PTX_CLONES
#endif
