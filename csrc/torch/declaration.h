// What the arguments of a call must be, as the op's declaration in Python says it: shapes by letter, dtypes, devices
// and values (gpt2fast/shapes.py, gpt2fast/values.py). Here it is only found out whether a call fits. What does not fit
// goes to Python, whose check words the error, so that nothing is stated twice.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gpt2fast {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kNone = -1;  // no argument, no letter

struct Dim {
  int letter = kNone;  // 0 for A; kNone: the dimension is exactly `size`
  int64_t size = 0;
  bool or_one = false;
};

struct Shape {
  bool leading = false;  // any dimensions before those of `dims`, the same for all tensors of a call
  std::vector<Dim> dims;
};

struct TensorRule {
  int argument;
  std::optional<ScalarType> dtype;  // none: float32, bfloat16, ..., the same for all such tensors of a call
  Shape shape, otherwise;           // `otherwise` where the bool argument `condition` is false
  int condition = kNone;
};

struct Bound {
  double number = 0;
  int letter = kNone;  // the bound is the size of this letter
  bool closed = true;
};

struct ValueRule {
  enum Kind { kChoice, kInterval, kGiven, kDrawable } kind;
  int argument = kNone, letter = kNone;  // what the rule is about: one of the two
  std::vector<std::string> choices;
  Bound low, high;
  std::optional<int64_t> also;  // allowed besides, or the value of argument also_argument
  int also_argument = kNone;
  int start = kNone, count = kNone;  // an absent tensor's values: `count` of them from argument `start` on
  // kGiven: the tensor must be there where this argument is above 0. kDrawable: no row of the tensor may hold NaN, and
  // where the argument is above 0 the greatest value of each must be finite.
  int condition = kNone;
};

// One argument of a call.
struct Value {
  const Tensor* tensor = nullptr;  // null for a scalar and for what is not given
  bool given = true;
  int64_t integer = 0;
  double number = 0;
  std::string_view text;
};

inline Value value(const Tensor& t) { return {.tensor = &t}; }
inline Value value(const OptionalTensor& t) { return {.tensor = t ? &*t : nullptr, .given = t.has_value()}; }
inline Value value(int64_t i) { return {.integer = i, .number = double(i)}; }
inline Value value(bool b) { return {.integer = b, .number = double(b)}; }
inline Value value(double d) { return {.number = d}; }
inline Value value(std::optional<double> d) { return {.given = d.has_value(), .number = d.value_or(0)}; }
inline Value value(std::optional<int64_t> i) {
  return {.given = i.has_value(), .integer = i.value_or(0), .number = double(i.value_or(0))};
}
inline Value value(std::string_view text) { return {.text = text}; }

struct Declaration {
  std::vector<TensorRule> tensors;
  std::vector<ValueRule> values;

  // Whether a call with these arguments, in the order of the schema, is as declared.
  bool fits(const Value* arguments) const;

  // The first tensor whose dtype is not fixed: its dtype is the call's. Null where there is none.
  const Tensor* first_floating(const Value* arguments) const;
};

// By "namespace::name". The address stays; declaring an op again changes what is there.
void declare(const std::string& op, Declaration declaration);
const Declaration& declaration_of(const std::string& op);

}  // namespace gpt2fast
