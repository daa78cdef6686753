// Arrays of zeros that take memory only where they are touched. A launch has such arrays with an entry for each
// register or instruction of its module, but it uses only one kernel of the module.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <type_traits>

namespace gpt2fast::ptx {

template <class T>
class Zeros {
  static_assert(std::is_trivially_destructible_v<T>);  // besides, a T whose bits are all 0 must be its zero

 public:
  Zeros() = default;
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  ~Zeros() { clear(); }

  // Fresh pages from the system are zero.
  void resize(size_t size) {
    clear();
    if (size == 0) return;
    void* made = mmap(nullptr, size * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(made), size_ = size;
  }

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  void clear() {
    if (data_) munmap(data_, size_ * sizeof(T));
    data_ = nullptr, size_ = 0;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gpt2fast::ptx
