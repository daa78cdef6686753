#include "vec_neon.h"

#include "kernels.h"

GPT2FAST_TABLE(neon)
