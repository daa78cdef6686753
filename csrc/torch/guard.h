// A CPU allocator for tests. It puts a pattern of bytes before and after every block, and checks it when the block is
// freed, so that a write outside of a tensor is found.
#pragma once
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace gpt2fast {

class GuardAllocator final : public c10::Allocator {
 public:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPattern = 0xA5;
  static std::atomic<int64_t>& violations() {
    static std::atomic<int64_t> count{0};
    return count;
  }

  c10::DataPtr allocate(size_t n) override {
    auto* block = static_cast<unsigned char*>(std::aligned_alloc(64, (n + 2 * kGuard + 63) / 64 * 64));
    TORCH_CHECK(block, "out of memory: ", n, " bytes");
    std::memcpy(block, &n, sizeof n);
    std::memset(block + sizeof n, kPattern, kGuard - sizeof n);
    std::memset(block + kGuard + n, kPattern, kGuard);
    return {block + kGuard, block, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }

 private:
  static void release(void* context) {
    auto* block = static_cast<unsigned char*>(context);
    size_t n;
    std::memcpy(&n, block, sizeof n);
    bool intact = true;
    for (size_t i = sizeof n; i < kGuard; ++i) intact &= block[i] == kPattern;
    for (size_t i = 0; i < kGuard; ++i) intact &= block[kGuard + n + i] == kPattern;
    violations() += !intact;
    std::free(block);
  }
};

// Switches guarding on or off for all CPU tensors that are allocated from now on. Returns how many broken guards were
// found so far.
inline int64_t guard_memory(bool on) {
  static GuardAllocator guard;
  static c10::Allocator* plain = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guard : plain, 255);
  return GuardAllocator::violations();
}

}  // namespace gpt2fast
