// Memory between two pages that nobody may touch: the block lies against the one after it or the one before it; what is
// left of its pages on the other side holds a pattern, and is poisoned where AddressSanitizer is there.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#endif

class Guarded {
 public:
  enum Side { kBeforeFence, kAfterFence };

  // `bytes` bytes of 0xff, which is NaN in every floating type and -1 in int64.
  Guarded(size_t bytes, Side side) : bytes_(bytes), page_(size_t(sysconf(_SC_PAGESIZE))) {
    inner_ = (bytes + page_ - 1) / page_ * page_;
    void* block = mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) std::perror("mmap"), std::exit(2);
    begin_ = (unsigned char*)block + page_;
    if (inner_ && mprotect(begin_, inner_, PROT_READ | PROT_WRITE)) std::perror("mprotect"), std::exit(2);
    size_t slack = inner_ - bytes;
    data_ = begin_ + (side == kBeforeFence ? slack : 0);
    slack_ = {side == kBeforeFence ? begin_ : begin_ + bytes, slack};
    std::memset(data_, 0xff, bytes);
    std::memset(slack_.begin, kPattern, slack_.size);
    ASAN_POISON_MEMORY_REGION(slack_.begin, slack_.size);
  }

  // A copy that can only be read.
  Guarded(const void* from, size_t bytes, Side side) : Guarded(bytes, side) {
    if (bytes) std::memcpy(data_, from, bytes);
    if (inner_ && mprotect(begin_, inner_, PROT_READ)) std::perror("mprotect"), std::exit(2);
  }

  Guarded(Guarded&& other) noexcept { *this = static_cast<Guarded&&>(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::memcpy((void*)this, &other, sizeof other);
    other.begin_ = nullptr;
    return *this;
  }

  ~Guarded() {
    if (!begin_) return;
    ASAN_UNPOISON_MEMORY_REGION(slack_.begin, slack_.size);
    munmap(begin_ - page_, inner_ + 2 * page_);
  }

  void* data() const { return data_; }
  size_t size() const { return bytes_; }

  bool intact() const {
    ASAN_UNPOISON_MEMORY_REGION(slack_.begin, slack_.size);
    bool fine = true;
    for (size_t i = 0; i < slack_.size; ++i) fine &= slack_.begin[i] == kPattern;
    return fine;
  }

 private:
  static constexpr unsigned char kPattern = 0xa5;
  struct Span {
    unsigned char* begin;
    size_t size;
  };
  size_t bytes_, page_, inner_;
  unsigned char *begin_, *data_;
  Span slack_;
};
