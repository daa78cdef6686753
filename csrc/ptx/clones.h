// PTX_CLONES compiles a function for several instruction sets. The loader takes the best one that the processor has.
#pragma once
#include <cstdint>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define PTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define PTX_CLONES __attribute__((target_clones("default", "avx2")))
#endif
#else
#define PTX_CLONES
#endif
