#include "vec_avx2.h"

#include "kernels.h"

GPT2FAST_TABLE(avx2)
