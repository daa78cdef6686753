// Constants and random numbers that the C++ and the CUDA kernels share. They compile for the host and for the device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define GPT2FAST_HD __host__ __device__ __forceinline__
#else
#define GPT2FAST_HD inline
#endif

namespace gpt2fast {

constexpr float kSqrtTwoOverPi = 0.7978845608028654f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;

// Philox 4x32-10 (Salmon et al., SC11, "Parallel random numbers: as easy as 1, 2, 3"). It maps a 64-bit key and a
// 128-bit counter to four random words of 32 bits.
struct Philox {
  uint32_t word[4];

  GPT2FAST_HD Philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    uint32_t c0 = uint32_t(counter_low), c1 = uint32_t(counter_low >> 32);
    uint32_t c2 = uint32_t(counter_high), c3 = uint32_t(counter_high >> 32);
    for (int round = 0; round < 10; ++round) {
      uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
      uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
  }

  // Uniform in [0, 1). It takes the top 24 bits of a word, which float32 represents exactly.
  GPT2FAST_HD float uniform(int i) const { return float(word[i] >> 8) * 5.9604644775390625e-8f; }

  // Uniform in [0, 1), from 53 random bits. Word 0 gives the high bits.
  GPT2FAST_HD double uniform53() const {
    return double((uint64_t(word[0]) << 21) ^ uint64_t(word[1] >> 11)) * 1.1102230246251565e-16;
  }
};

// Whether dropout with probability p keeps the attention probability of batch row b, head h, query i and key j. `block`
// must have the counter (j / 4, (b H + h) T + i); key j takes its word j % 4.
GPT2FAST_HD bool dropout_keeps(const Philox& block, int64_t j, float p) { return block.uniform(int(j & 3)) >= p; }

}  // namespace gpt2fast
