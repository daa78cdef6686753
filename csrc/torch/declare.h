// Converts an op's declaration from the plain tuples that Python hands over (backends.declare) to the structs of
// csrc/torch/declaration.h.
#pragma once
#include <torch/extension.h>

#include "declaration.h"

namespace gpt2fast {

using DimRow = std::tuple<int, int64_t, bool>;
using ShapeRow = std::tuple<bool, std::vector<DimRow>>;
using TensorRow = std::tuple<int, py::object, ShapeRow, ShapeRow, int>;
using BoundRow = std::tuple<double, int, bool>;
using ValueRow = std::tuple<std::string, int, int, std::vector<std::string>, BoundRow, BoundRow, std::optional<int64_t>,
                            int, int, int, int>;

inline Shape to_shape(const ShapeRow& row) {
  Shape shape{.leading = std::get<0>(row), .dims = {}};
  for (auto [letter, size, or_one] : std::get<1>(row))
    shape.dims.push_back({.letter = letter, .size = size, .or_one = or_one});
  return shape;
}

inline Bound to_bound(const BoundRow& row) {
  auto [number, letter, closed] = row;
  return {.number = number, .letter = letter, .closed = closed};
}

inline ValueRule::Kind to_kind(const std::string& kind) {
  if (kind == "choice") return ValueRule::kChoice;
  if (kind == "interval") return ValueRule::kInterval;
  if (kind == "given") return ValueRule::kGiven;
  TORCH_CHECK_VALUE(kind == "drawable", "gpt2fast: a rule must be of a kind of gpt2fast/values.py, got ", kind);
  return ValueRule::kDrawable;
}

inline void declare_rows(const std::string& op, const std::vector<TensorRow>& tensors,
                         const std::vector<ValueRow>& values) {
  Declaration declaration;
  for (const auto& [argument, dtype, shape, otherwise, condition] : tensors)
    declaration.tensors.push_back({
        .argument = argument,
        .dtype = dtype.is_none() ? std::nullopt : std::optional(dtype.cast<ScalarType>()),
        .shape = to_shape(shape),
        .otherwise = to_shape(otherwise),
        .condition = condition,
    });
  for (const auto& [kind, argument, letter, choices, low, high, also, also_argument, start, count, condition] : values)
    declaration.values.push_back({
        .kind = to_kind(kind),
        .argument = argument,
        .letter = letter,
        .choices = choices,
        .low = to_bound(low),
        .high = to_bound(high),
        .also = also,
        .also_argument = also_argument,
        .start = start,
        .count = count,
        .condition = condition,
    });
  declare(op, std::move(declaration));
}

}  // namespace gpt2fast
