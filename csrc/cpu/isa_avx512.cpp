#include "vec_avx512.h"

#include "kernels.h"

GPT2FAST_TABLE(avx512)
