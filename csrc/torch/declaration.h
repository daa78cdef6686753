// What the arguments of a call must be, as the op's declaration in Python says: shapes by letter, dtypes, devices and
// values (gpt2fast/shapes.py, gpt2fast/values.py). This code only decides whether a call fits. A call that does not fit
// goes to Python, whose check raises the error, so that no error message is written twice.
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

constexpr int kNone = -1;  // no such argument, or no letter

struct Dim {
  int letter = kNone;  // 0 for A, 1 for B, ...; kNone: the dimension is exactly `size`
  int64_t size = 0;
  bool or_one = false;  // 1 is allowed too
};

struct Shape {
  bool leading = false;  // any dimensions may come before those of `dims`, the same for all tensors of a call
  std::vector<Dim> dims;
};

struct TensorRule {
  int argument;
  std::optional<ScalarType> dtype;  // none: any floating dtype, the same for all such tensors of a call
  Shape shape, otherwise;           // `otherwise` holds where the bool argument `condition` is false
  int condition = kNone;
};

struct Bound {
  double number = 0;
  int letter = kNone;  // if there is one, the bound is the size of this letter and not `number`
  bool closed = true;
};

struct ValueRule {
  enum Kind { kChoice, kInterval, kGiven, kDrawable } kind;
  int argument = kNone, letter = kNone;  // what the rule is about: an argument, or the size of a letter
  std::vector<std::string> choices;
  Bound low, high;
  std::optional<int64_t> also;  // one more value that is allowed; also_argument takes it from an argument
  int also_argument = kNone;
  // Where the tensor is absent, its values are start, start + 1, ...: as many as the size of letter `count`, from the
  // argument `start` on.
  int start = kNone, count = kNone;
  // An argument. kGiven: the tensor must be given if it is above 0. kDrawable: no row of the tensor may have a NaN, and
  // if it is above 0, the greatest value of each row must be finite.
  int condition = kNone;
};

// One argument of a call.
struct Value {
  const Tensor* tensor = nullptr;  // null for a scalar, and for an argument that is not given
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

  // Whether a call with these arguments fits the declaration. They are in the order of the op's schema.
  bool fits(const Value* arguments) const;

  // The first tensor whose dtype the declaration leaves open. Its dtype is the call's. Null if there is none.
  const Tensor* first_floating(const Value* arguments) const;
};

// Whether no row of t has a NaN and, if `finite` is set, the greatest value of each row is finite. float64 is not
// checked here: no kernel of ours covers it, and Python checks what it gets from here.
bool is_drawable(const Tensor& t, bool finite);

// Declarations by "namespace::name". The address of an op's declaration never changes; to declare the op again changes
// what is stored there.
void declare(const std::string& op, Declaration declaration);
const Declaration& declaration_of(const std::string& op);

}  // namespace gpt2fast
