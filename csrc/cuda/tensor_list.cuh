// Many tensors in one launch: a block reads from two tables on the device which numbers of which tensor it has.
#pragma once
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr int kListColumns = 5;  // of the table of tensors: four addresses, of which unused ones are 0, and the size
constexpr int kSizeColumn = 4;

// The numbers of this block: of one tensor those from `first` on, and before `end`.
struct Share {
  const int64_t* row;  // of the table of tensors
  int32_t tensor;
  int64_t first, end;

  // `programs` has two numbers a block: its tensor, and which `numbers` numbers of that it has, counted from 0.
  __device__ __forceinline__ Share(const int64_t* tensors, const int32_t* programs, int numbers) {
    tensor = programs[2 * int64_t(blockIdx.x)];
    first = int64_t(programs[2 * int64_t(blockIdx.x) + 1]) * numbers;
    row = tensors + int64_t(tensor) * kListColumns;
    const int64_t size = row[kSizeColumn];
    end = first + numbers < size ? first + numbers : size;
  }

  // A tensor's first number. The compiler cannot see that an address out of a table is one of global memory.
  template <class T>
  __device__ __forceinline__ T* address(int column) const {
    T* found = reinterpret_cast<T*>(row[column]);
    __builtin_assume(__isGlobal(found));
    return found;
  }

  // Where the last whole group of `group` numbers ends.
  __device__ __forceinline__ int64_t end_of_groups(int group) const {
    return first + int64_t(unsigned(end - first) / group * group);
  }
};

// --- on the host ---

// Whether a grid holds so many blocks.
inline bool fits_grid(int64_t blocks) { return 0 <= blocks && blocks <= INT32_MAX; }

}  // namespace gpt2fast::cuda
