// What cases.py wrote, read back: integers are int64 and floats float64, little-endian; a text is its length and bytes.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/dtype.h"

struct Input {
  std::vector<int64_t> sizes, strides;
  std::vector<unsigned char> memory;  // from the first element to the last, gaps included
};

struct Output {
  std::string name, dtype;
  double rms_bound, max_bound;  // of the error against the truth; 0 for integers
};

struct Draw {
  std::map<std::string, Input> inputs;
  std::vector<std::vector<double>> truths;  // of each output
};

struct Case {
  std::string op, label;
  gpt2fast::DType dtype;
  std::map<std::string, std::string> plain;  // arguments that are no tensors
  std::vector<Output> outputs;
  std::vector<Draw> draws;  // several where the outputs are few numbers: their errors are pooled
};

inline size_t size_of(const std::string& dtype) {
  if (dtype == "float32") return 4;
  if (dtype == "bfloat16" || dtype == "float16") return 2;
  if (dtype == "int64") return 8;
  throw std::runtime_error("unknown dtype " + dtype);
}

inline double value_at(const std::string& dtype, const void* data, size_t i) {
  auto as = [&](auto value) {
    std::memcpy(&value, (const char*)data + i * sizeof value, sizeof value);
    return value;
  };
  if (dtype == "float32") return as(0.f);
  if (dtype == "bfloat16") return gpt2fast::to_float(as(gpt2fast::bfloat16{}));
  if (dtype == "float16") return gpt2fast::to_float(as(gpt2fast::float16{}));
  return double(as(int64_t{}));
}

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) throw std::runtime_error(std::string("cannot read ") + path);
  }
  Reader(const Reader&) = delete;
  ~Reader() { std::fclose(file_); }

  // The next case; false at the end of the file.
  bool next(Case& c) {
    int byte = std::fgetc(file_);
    if (byte == EOF) return false;
    std::ungetc(byte, file_);
    c = Case();
    c.op = text();
    c.label = text();
    std::string dtype = text();
    c.dtype = dtype == "float32"    ? gpt2fast::DType::kFloat32
              : dtype == "bfloat16" ? gpt2fast::DType::kBFloat16
                                    : gpt2fast::DType::kFloat16;
    for (int64_t n = integer(); n > 0; --n) {
      std::string name = text();
      c.plain[name] = text();
    }
    c.outputs.resize(size_t(integer()));
    for (Output& output : c.outputs) {
      output.name = text();
      output.dtype = text();
      read(&output.rms_bound, 8);
      read(&output.max_bound, 8);
    }
    c.draws.resize(size_t(integer()));
    for (Draw& draw : c.draws) {
      for (int64_t n = integer(); n > 0; --n) read_input(draw);
      draw.truths.resize(c.outputs.size());
      for (auto& truth : draw.truths) {
        truth.resize(size_t(integer()));
        read(truth.data(), truth.size() * 8);
      }
    }
    return true;
  }

 private:
  void read(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, file_) != bytes) throw std::runtime_error("the file of cases is cut short");
  }
  void read_input(Draw& draw) {
    Input& input = draw.inputs[text()];
    text();  // its dtype, which the op's struct knows
    input.sizes.resize(size_t(integer()));
    input.strides.resize(input.sizes.size());
    for (int64_t& size : input.sizes) size = integer();
    for (int64_t& stride : input.strides) stride = integer();
    input.memory.resize(size_t(integer()));
    read(input.memory.data(), input.memory.size());
  }
  int64_t integer() {
    int64_t value;
    read(&value, 8);
    return value;
  }
  std::string text() {
    std::string words(size_t(integer()), ' ');
    read(words.data(), words.size());
    return words;
  }

  std::FILE* file_;
};
