// The memory of large outputs: blocks on huge pages. A freed block is kept for the next output of about its size, and
// the system may take its pages back in the meantime. The reason: malloc maps every block above 32 MiB anew, and the
// page faults cost more than most kernels.
#pragma once
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "declaration.h"

namespace gpt2fast {

constexpr size_t kHugePage = size_t(2) << 20;

// A private mapping that starts on a 2 MiB boundary, in huge pages where the system has them.
class HugeBlock {
 public:
  explicit HugeBlock(size_t nbytes) : size_((std::max(nbytes, size_t(1)) + kHugePage - 1) / kHugePage * kHugePage) {
    mapped_ = mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, mapped_ != MAP_FAILED, "gpt2fast: out of memory: ", nbytes, " bytes");
    data_ = (void*)((uintptr_t(mapped_) + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data_, size_, MADV_HUGEPAGE);
#endif
  }
  ~HugeBlock() { munmap(mapped_, size_ + kHugePage); }
  HugeBlock(const HugeBlock&) = delete;
  HugeBlock& operator=(const HugeBlock&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }

  // Gives up the contents. The system takes the pages back if it runs short of memory, and only then.
  void lend() {
#ifdef MADV_FREE
    madvise(data_, size_, MADV_FREE);
#endif
  }

 private:
  size_t size_;
  void *mapped_, *data_;
};

class OutputAllocator final : public c10::Allocator {
 public:
  static constexpr size_t kLeast = size_t(4) << 20;       // smaller outputs come from torch's allocator
  static constexpr size_t kMostKept = size_t(512) << 20;  // bytes of blocks that are not in use

  static OutputAllocator& instance() {
    static OutputAllocator& allocator = create();
    return allocator;
  }

  c10::DataPtr allocate(size_t nbytes) override {
    HugeBlock* block = take(nbytes).release();
    report(block, int64_t(block->size()));
    return {block->data(), block, [](void* context) { instance().give_back((HugeBlock*)context); }, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }

  // Unmaps the blocks that are not in use. Returns how many bytes they had.
  size_t release() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t released = kept_;
    free_.clear();
    kept_ = 0;
    return released;
  }

 private:
  using Block = std::unique_ptr<HugeBlock>;

  // It is never destroyed, so that it outlives every tensor. The lock is held during a fork: otherwise the child could
  // start with a lock that a thread of the parent held, and that thread does not exist in the child.
  static OutputAllocator& create() {
    static auto* allocator = new OutputAllocator;
    pthread_atfork([] { allocator->mutex_.lock(); }, [] { allocator->mutex_.unlock(); },
                   [] { allocator->mutex_.unlock(); });
    return *allocator;
  }

  // The smallest free block that is large enough and not much larger; if there is none, a new block.
  Block take(size_t nbytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if ((*it)->size() >= nbytes && (*it)->size() <= nbytes + nbytes / 4 + kHugePage &&
            (best == free_.end() || (*it)->size() < (*best)->size()))
          best = it;
      if (best != free_.end()) {
        Block block = std::move(*best);
        free_.erase(best);
        kept_ -= block->size();
        return block;
      }
    }
    return std::make_unique<HugeBlock>(nbytes);
  }

  // torch.profiler sees these blocks come and go as it sees PyTorch's own memory.
  void report(HugeBlock* block, int64_t change) {
    size_t used = used_ += change;
    if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(block->data(), change, used, used, at::kCPU);
  }

  void give_back(HugeBlock* raw) {
    Block block(raw);
    report(raw, -int64_t(block->size()));
    block->lend();
    std::lock_guard<std::mutex> lock(mutex_);
    kept_ += block->size();
    free_.push_back(std::move(block));
    while (kept_ > kMostKept) {  // unmaps the oldest first
      kept_ -= free_.front()->size();
      free_.erase(free_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order in which they were given back
  size_t kept_ = 0;
  std::atomic<size_t> used_{0};
};

// The same as at::empty for a contiguous CPU tensor, without the way through the dispatcher (a tenth of a microsecond
// for each). If another CPU allocator is set, it is used; if torch's settings ask for filled memory, it is filled.
inline Tensor allocate_output(at::IntArrayRef sizes, ScalarType dtype) {
  static c10::Allocator* const plain = c10::GetDefaultCPUAllocator();
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    return at::empty(sizes, dtype);
  size_t nbytes = size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  c10::Allocator* allocator = c10::GetCPUAllocator();
  if (nbytes >= OutputAllocator::kLeast && allocator == plain) allocator = &OutputAllocator::instance();
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

}  // namespace gpt2fast
