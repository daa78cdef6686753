// Words every shape, dtype and device error, as gpt2fast/shapes.py does: dimensions by letter, "... C", "B|1", digits.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../ops.h"

namespace gpt2fast {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Why the CPU kernels do not cover a dtype, or null.
inline const char* uncovered_dtype(ScalarType dtype) {
  bool covered = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  return covered ? nullptr : "the kernels cover float32, bfloat16 and float16 only";
}

inline const char* uncovered_attention(ScalarType dtype, int64_t D) {
  if (auto why = uncovered_dtype(dtype)) return why;
  return D >= 1 && D <= 256 ? nullptr : "the kernels cover head sizes 1 to 256 only";
}

// Whether the call is one of a forward pass for gradients on a CPU with AMX, as backends.recording says.
inline bool& recording_with_amx() {
  static thread_local bool value = false;
  return value;
}

// Inference keeps to our kernel, whose rows have the same bits whatever the batch; training need not.
inline const char* uncovered_linear(const Tensor& x) {
  if (auto why = uncovered_dtype(x.scalar_type())) return why;
  bool many = x.dim() && x.numel() >= 32 * x.size(-1);
  bool faster = recording_with_amx() && many && x.scalar_type() == at::kBFloat16;
  return faster ? "in training PyTorch's bfloat16 product is faster: it uses AMX" : nullptr;
}

// Why the kernel of an op does not run a call whose first floating tensor is `first`, or null: as its binding asks.
inline const char* objection(std::string_view op, const Tensor& first) {
  if (op == "linear") return uncovered_linear(first);
  bool heads = op == "attention" || op == "decode_attention";
  return heads ? uncovered_attention(first.scalar_type(), first.size(-1)) : uncovered_dtype(first.scalar_type());
}

inline DType to_dtype(ScalarType dtype) {
  return dtype == at::kFloat ? DType::kFloat32 : dtype == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

class Check {
 public:
  explicit Check(const char* op) : op_(op) { std::fill(sizes_, sizes_ + 26, -1); }

  // A tensor whose dtype is that of the first such tensor; with `dtype`, one of exactly that dtype.
  Check& operator()(const char* name, const Tensor& t, const char* dims, std::optional<ScalarType> dtype = {}) {
    if (!first_.tensor) first_ = {name, &t};
    TORCH_CHECK_VALUE(t.device() == first_.tensor->device(), prefix(name), "must be on ", first_.tensor->device(),
                      " as ", first_.name, " is, got ", t.device());
    if (dtype) {
      TORCH_CHECK_TYPE(t.scalar_type() == *dtype, prefix(name), "must have dtype ", word(*dtype), ", got ",
                       word(t.scalar_type()));
    } else {
      TORCH_CHECK_TYPE(t.is_floating_point(), prefix(name), "must be a floating-point tensor, got ",
                       word(t.scalar_type()));
      if (!floating_.tensor) floating_ = {name, &t};
      TORCH_CHECK_TYPE(t.scalar_type() == floating_.tensor->scalar_type(), prefix(name), "must have dtype ",
                       word(floating_.tensor->scalar_type()), " as ", floating_.name, " is, got ",
                       word(t.scalar_type()));
    }
    TORCH_CHECK_VALUE(fits(dims, t.sizes()), prefix(name), "must have shape ", describe(dims), ", got ",
                      tuple(t.sizes()));
    return *this;
  }
  Check& operator()(const char* name, const OptionalTensor& t, const char* dims, std::optional<ScalarType> dtype = {}) {
    return t ? (*this)(name, *t, dims, dtype) : *this;
  }

  int64_t operator[](char letter) const { return sizes_[letter - 'A']; }

  // Every value of an int64 CPU tensor in [0, high), or equal to *allowed.
  void within(const char* name, const Tensor& t, int64_t high, std::optional<int64_t> allowed = {}) const {
    Tensor flat = t.contiguous();
    const int64_t* values = flat.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < flat.numel(); ++i) {
      if ((values[i] >= 0 && values[i] < high) || (allowed && values[i] == *allowed)) continue;
      std::vector<int64_t> at(t.dim());
      for (int64_t d = t.dim() - 1, rest = i; d >= 0; rest /= t.size(d--)) at[d] = rest % t.size(d);
      std::string also = allowed ? " or be " + std::to_string(*allowed) : "";
      TORCH_CHECK_VALUE(false, prefix(name), "must lie in [0, ", high, ")", also, ", got ", values[i], " at ",
                        tuple(at));
    }
  }
  void within(const char* name, const OptionalTensor& t, int64_t high) const {
    if (t) within(name, *t, high);
  }

  std::string prefix(const char* name) const { return std::string("gpt2fast::") + op_ + ": " + name + " "; }

  static std::string tuple(at::IntArrayRef values) {
    std::vector<std::string> words;
    for (int64_t v : values) words.push_back(std::to_string(v));
    return tuple(words);
  }

 private:
  struct Named {
    const char* name = nullptr;
    const Tensor* tensor = nullptr;  // outlives the call
  };

  static std::string word(ScalarType dtype) {
    switch (dtype) {
      case at::kFloat:
        return "float32";
      case at::kDouble:
        return "float64";
      case at::kHalf:
        return "float16";
      case at::kBFloat16:
        return "bfloat16";
      case at::kLong:
        return "int64";
      case at::kInt:
        return "int32";
      case at::kShort:
        return "int16";
      case at::kChar:
        return "int8";
      case at::kByte:
        return "uint8";
      case at::kBool:
        return "bool";
      default:
        return c10::toString(dtype);
    }
  }

  static std::vector<std::string> split(const char* dims) {
    std::istringstream stream(dims);
    std::vector<std::string> words;
    for (std::string w; stream >> w;) words.push_back(w);
    return words;
  }

  static std::string tuple(const std::vector<std::string>& words) {
    std::string out = "(";
    for (size_t i = 0; i < words.size(); ++i) out += (i ? ", " : "") + words[i];
    return out + (words.size() == 1 ? ",)" : ")");
  }

  // Walks the text without allocating: this runs in every call.
  bool fits(const char* dims, at::IntArrayRef shape) {
    int64_t named = 0, before[26];
    bool leading = dims[0] == '.';
    const char* p = leading ? dims + 3 : dims;
    for (const char* c = p; *c; ++c) named += *c != ' ' && (c == p || c[-1] == ' ');
    int64_t split = int64_t(shape.size()) - named;
    if (split < 0 || (split > 0 && !leading)) return false;
    if (leading) {
      if (leading_set_ && !leading_.equals(shape.slice(0, split))) return false;
    }
    std::copy(sizes_, sizes_ + 26, before);
    for (int64_t d = split; *p;) {
      if (*p == ' ') {
        ++p;
        continue;
      }
      bool broadcast = p[1] == '|';
      int64_t size = shape[d++], digit = *p >= '0' && *p <= '9' ? *p - '0' : -1;
      if (!(broadcast && size == 1)) {
        int64_t known = digit >= 0 ? digit : sizes_[*p - 'A'];
        if (known >= 0 && known != size) {
          std::copy(before, before + 26, sizes_);
          return false;
        }
        if (digit < 0) sizes_[*p - 'A'] = size;
      }
      p += broadcast ? 3 : 1;
    }
    if (leading && !leading_set_) leading_set_ = true, leading_ = shape.slice(0, split);
    return true;
  }

  std::string describe(const char* dims) const {
    std::vector<std::string> words = split(dims), values;
    for (const std::string& w : words) {
      bool broadcast = w.find('|') != std::string::npos;
      std::string value = w.substr(0, w.find('|'));
      if (w == "...") {
        if (leading_set_) {
          for (int64_t v : leading_) values.push_back(std::to_string(v));
          continue;
        }
      } else if (value[0] >= 'A' && value[0] <= 'Z' && sizes_[value[0] - 'A'] >= 0) {
        value = std::to_string(sizes_[value[0] - 'A']);
      }
      values.push_back(broadcast ? value + " or 1" : value);
    }
    std::string named = tuple(words), numbers = tuple(values);
    return named == numbers ? named : named + " = " + numbers;
  }

  const char* op_;
  int64_t sizes_[26];
  bool leading_set_ = false;
  at::IntArrayRef leading_;  // of a tensor that outlives the call
  Named first_, floating_;
};

}  // namespace gpt2fast
