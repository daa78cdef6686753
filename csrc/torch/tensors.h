// Converts tensors to what kernels take: pointers, dtypes, rows at one stride. A tensor is copied only if its strides
// do not fit.
#pragma once
#include <string_view>
#include <vector>

#include "../ops.h"
#include "declaration.h"

namespace gpt2fast {

inline DType to_dtype(ScalarType dtype) {
  return dtype == at::kFloat ? DType::kFloat32 : dtype == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

inline DType dtype_of(const Tensor& t) { return to_dtype(t.scalar_type()); }

// The activation of an op's argument, which has been checked.
inline Activation activation_of(std::string_view name) {
  return name == "none" ? Activation::kNone : name == "gelu_tanh" ? Activation::kGeluTanh : Activation::kGeluErf;
}

// x as `count` rows along its last dimension, which is dense, with one stride between rows. x is copied only if its
// strides do not allow that.
struct Rows {
  c10::MaybeOwned<Tensor> held;  // x itself, or the copy
  int64_t count = 1, stride = 0;
  const void* data;

  explicit Rows(const Tensor& x) : held(c10::MaybeOwned<Tensor>::borrowed(x)) {
    for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
    if (x.dim() && (x.stride(-1) == 1 || x.size(-1) <= 1) && collapses(x)) {
      stride = x.dim() > 1 ? outer_stride(x) : x.size(-1);
    } else {
      held = c10::MaybeOwned<Tensor>::owned(x.contiguous());
      stride = x.dim() ? x.size(-1) : 1;
    }
    data = held->const_data_ptr();
  }

 private:
  static int64_t outer_stride(const Tensor& x) {  // the stride of the innermost leading dimension whose size is not 1
    for (int64_t d = x.dim() - 2; d >= 0; --d)
      if (x.size(d) != 1) return x.stride(d);
    return x.size(-1);
  }
  static bool collapses(const Tensor& x) {  // whether one stride leads through all leading dimensions
    int64_t expected = -1;
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (expected >= 0 && x.stride(d) != expected) return false;
      expected = x.stride(d) * x.size(d);
    }
    return true;
  }
};

// The rows of a tensor that may be absent.
struct OptionalRows {
  std::optional<Rows> rows;
  const void* data = nullptr;
  int64_t stride = 0;

  explicit OptionalRows(const OptionalTensor& x) {
    if (!x) return;
    rows.emplace(*x);
    data = rows->data, stride = rows->stride;
  }
};

template <class T = void>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

inline Tensor dense_inside(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }
inline OptionalTensor dense_inside(const OptionalTensor& t) { return t ? OptionalTensor(dense_inside(*t)) : t; }

// The sizes of x with the last one replaced.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

}  // namespace gpt2fast
