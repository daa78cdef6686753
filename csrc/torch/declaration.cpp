#include "declaration.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

#include "../dtype.h"
#include "tensors.h"

namespace gpt2fast {
namespace {

// The sizes that the letters stand for in one call. They are found while its shapes are compared.
struct Sizes {
  int64_t of_letter[26];
  bool has_leading = false;
  at::IntArrayRef leading;  // of a tensor that outlives the call

  Sizes() { std::fill(of_letter, of_letter + 26, -1); }

  bool take(const Shape& shape, at::IntArrayRef sizes) {
    int64_t rest = int64_t(sizes.size()) - int64_t(shape.dims.size());
    if (rest < 0 || (rest > 0 && !shape.leading)) return false;
    if (shape.leading) {
      at::IntArrayRef found = sizes.slice(0, rest);
      if (has_leading && !leading.equals(found)) return false;
      has_leading = true, leading = found;
    }
    for (size_t i = 0; i < shape.dims.size(); ++i) {
      const Dim& dim = shape.dims[i];
      int64_t size = sizes[rest + i];
      if (dim.or_one && size == 1) continue;
      int64_t known = dim.letter == kNone ? dim.size : of_letter[dim.letter];
      if (known >= 0 && known != size) return false;
      if (dim.letter != kNone) of_letter[dim.letter] = size;
    }
    return true;
  }

  double operator()(const Bound& bound) const {
    return bound.letter == kNone ? bound.number : double(of_letter[bound.letter]);
  }
};

// Whether each element of t is in [low, high] or equals `also`.
bool all_within(const Tensor& t, int64_t low, int64_t high, std::optional<int64_t> also) {
  Tensor dense = t.contiguous();
  const int64_t *values = dense.const_data_ptr<int64_t>(), *end = values + dense.numel();
  return std::all_of(values, end, [&](int64_t v) { return (v >= low && v <= high) || (also && v == *also); });
}

// Whether none of n values is NaN and, if `finite` is set, the greatest of them is finite.
template <class T>
bool row_is_drawable(const T* x, int64_t n, bool finite) {
  uint32_t nan = 0, above = 0, some = 0;  // integers instead of early returns, so that the compiler vectorises the loop
  for (int64_t i = 0; i < n; ++i) {
    float value = to_float(x[i]);
    nan |= uint32_t(value != value);
    above |= uint32_t(value > std::numeric_limits<float>::max());
    some |= uint32_t(value >= std::numeric_limits<float>::lowest());
  }
  return !nan && (!finite || (some && !above));
}

}  // namespace

bool is_drawable(const Tensor& t, bool finite) {
  if (t.scalar_type() == at::kDouble || !t.numel()) return true;
  Rows rows(t);
  bool found = true;
  with_dtype(dtype_of(t), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = 0; r < rows.count && found; ++r)
      found = row_is_drawable((const T*)rows.data + r * rows.stride, t.size(-1), finite);
  });
  return found;
}

namespace {

bool lies_within(const ValueRule& rule, const Value* arguments, const Sizes& sizes) {
  double low = sizes(rule.low), high = sizes(rule.high);
  const Value argument = rule.argument == kNone ? value(sizes.of_letter[rule.letter]) : arguments[rule.argument];
  if (!argument.given && rule.start == kNone) return true;
  if (argument.given && !argument.tensor) {
    double value = argument.number;
    return (rule.low.closed ? value >= low : value > low) && (rule.high.closed ? value <= high : value < high);
  }
  int64_t first = int64_t(low) + !rule.low.closed, last = int64_t(high) - !rule.high.closed;
  if (argument.tensor) {
    std::optional<int64_t> also = rule.also;
    if (rule.also_argument != kNone) also = arguments[rule.also_argument].integer;
    return all_within(*argument.tensor, first, last, also);
  }
  int64_t start = arguments[rule.start].integer;
  return start >= first && start <= last + 1 - sizes.of_letter[rule.count];
}

bool holds(const ValueRule& rule, const Value* arguments, const Sizes& sizes) {
  switch (rule.kind) {
    case ValueRule::kChoice:
      return std::find(rule.choices.begin(), rule.choices.end(), arguments[rule.argument].text) != rule.choices.end();
    case ValueRule::kGiven:
      return arguments[rule.argument].tensor || !(arguments[rule.condition].number > 0);
    case ValueRule::kDrawable:
      return is_drawable(*arguments[rule.argument].tensor, arguments[rule.condition].number > 0);
    default:
      return lies_within(rule, arguments, sizes);
  }
}

struct Declarations {
  std::mutex mutex;
  std::map<std::string, Declaration> by_op;

  static Declarations& all() {
    static auto* declarations = new Declarations;
    return *declarations;
  }
};

}  // namespace

bool Declaration::fits(const Value* arguments) const {
  Sizes sizes;
  const Tensor *first = nullptr, *floating = nullptr;
  for (const TensorRule& rule : tensors) {
    const Tensor* t = arguments[rule.argument].tensor;
    if (!t) continue;
    if (first && t->device() != first->device()) return false;
    if (rule.dtype ? t->scalar_type() != *rule.dtype : !t->is_floating_point()) return false;
    if (!rule.dtype && floating && t->scalar_type() != floating->scalar_type()) return false;
    bool otherwise = rule.condition != kNone && !arguments[rule.condition].integer;
    if (!sizes.take(otherwise ? rule.otherwise : rule.shape, t->sizes())) return false;
    if (!first) first = t;
    if (!rule.dtype && !floating) floating = t;
  }
  return std::all_of(values.begin(), values.end(), [&](auto& rule) { return holds(rule, arguments, sizes); });
}

const Tensor* Declaration::first_floating(const Value* arguments) const {
  for (const TensorRule& rule : tensors)
    if (!rule.dtype && arguments[rule.argument].tensor) return arguments[rule.argument].tensor;
  return nullptr;
}

void declare(const std::string& op, Declaration declaration) {
  Declarations& all = Declarations::all();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.by_op[op] = std::move(declaration);
}

const Declaration& declaration_of(const std::string& op) {
  Declarations& all = Declarations::all();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.by_op.find(op);
  TORCH_CHECK(found != all.by_op.end(), op, " has a kernel in C++, so that its shapes must be declared as texts");
  return found->second;
}

}  // namespace gpt2fast
