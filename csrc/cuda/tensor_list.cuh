// Many tensors in one launch. A block reads from two tables on the device which tensor it has, and which block of that
// tensor's numbers. gpt2fast/tensor_lists.py makes the tables.
#pragma once
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr int kListColumns = 5;  // columns of the table of tensors: four addresses (unused ones are 0) and the size
constexpr int kSizeColumn = 4;

// The numbers of this block: those of one tensor from `first` up to, but without, `end`.
struct Share {
  const int64_t* row;  // the tensor's row of the table of tensors
  int32_t tensor;
  int64_t first, end;

  // `programs` has two numbers for each block: its tensor, and which block of `numbers` numbers of that tensor it has.
  __device__ __forceinline__ Share(const int64_t* tensors, const int32_t* programs, int numbers) {
    tensor = programs[2 * int64_t(blockIdx.x)];
    first = int64_t(programs[2 * int64_t(blockIdx.x) + 1]) * numbers;
    row = tensors + int64_t(tensor) * kListColumns;
    const int64_t size = row[kSizeColumn];
    end = first + numbers < size ? first + numbers : size;
  }

  // The address of the tensor's first number. The compiler must be told that an address from a table is global memory.
  template <class T>
  __device__ __forceinline__ T* address(int column) const {
    T* found = reinterpret_cast<T*>(row[column]);
    __builtin_assume(__isGlobal(found));
    return found;
  }

  // The place at which the last whole group of `group` numbers ends.
  __device__ __forceinline__ int64_t end_of_groups(int group) const {
    return first + int64_t(unsigned(end - first) / group * group);
  }
};

// --- On the host ---

// Whether a grid can have so many blocks.
inline bool fits_grid(int64_t blocks) { return 0 <= blocks && blocks <= INT32_MAX; }

}  // namespace gpt2fast::cuda
