// Adds the class DecodeStep to gpt2fast._C.
#pragma once
#include <pybind11/pybind11.h>

namespace gpt2fast {

void bind_decode_step(pybind11::module_& m);

}  // namespace gpt2fast
