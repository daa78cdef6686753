#include "vec_scalar.h"

#include "kernels.h"

GPT2FAST_TABLE(scalar)
