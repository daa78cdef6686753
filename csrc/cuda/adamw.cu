// One step of AdamW on many tensors in one launch. For each number w of the weights, with its gradient g:
//
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
//
// A block has kAdamwNumbers numbers of one tensor (tensor_list.cuh). A thread has packs of them that are kThreads packs
// apart, and reads all of these before it computes, in float32. At the end of a tensor, and if addresses are not
// aligned, it has single numbers that are kThreads apart.
//
// The floor is memory traffic: w, m and v are read and written once, and g is read once. docs/kernels.md counts 1.02
// times that.
#include <type_traits>

#include "../math.h"
#include "kernels.h"
#include "tensor_list.cuh"

namespace gpt2fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQuad = 4;  // float32 numbers in 128 bits; a block of Philox has as many words
enum Column { kWeight, kGradient, kFirstMoment, kSecondMoment };
static_assert(kSecondMoment < kSizeColumn && kPack<float> == kQuad);

// The four addresses of a tensor, read from the table.
template <class T>
struct Numbers {
  T* weights;
  const T* gradients;
  float *firsts, *seconds;  // the first and second moments, m and v

  __device__ __forceinline__ explicit Numbers(const Share& share)
      : weights(share.address<T>(kWeight)),
        gradients(share.address<const T>(kGradient)),
        firsts(share.address<float>(kFirstMoment)),
        seconds(share.address<float>(kSecondMoment)) {}
};

// What all numbers of a tensor share.
struct Step {
  float scale, correction, root;  // a factor of the gradients; 1 - beta1^step; sqrt(1 - beta2^step)
  uint64_t key, counter;          // the key of Philox; the upper half of its counter: tensor + 2^32 step

  // 1 - beta^step is -expm1(step log(beta)), which keeps its digits where it is near 0.
  __device__ __forceinline__ Step(const AdamwArgs& a, int32_t tensor) {
    const float step = *a.step;
    scale = a.scale ? *a.scale : 1.0f;
    correction = -expm1f(a.log_beta1 * step), root = sqrtf(-expm1f(a.log_beta2 * step));
    key = a.seed ? uint64_t(*a.seed) : 0, counter = uint64_t(tensor) + (uint64_t(step) << 32);
  }
};

// x / y, which may differ from the rounded quotient in the last two bits, as in Triton. An exactly rounded division
// takes twice as many instructions.
__device__ __forceinline__ float quotient(float x, float y) {
  float found;
  asm("div.full.f32 %0, %1, %2;" : "=f"(found) : "f"(x), "f"(y));
  return found;
}

// Returns the new weight and changes both moments. Fused operations are written out, so that packs and single numbers
// give the same bits.
__device__ __forceinline__ float updated(const AdamwArgs& a, const Step& step, float w, float g, float& m, float& v) {
  g = __fmul_rn(g, step.scale);
  m = fmaf(a.rest1, g - m, m);
  v = fmaf(a.rest2 * g, g, a.beta2 * v);
  const float denominator = (quotient(sqrtf(v), step.root) + a.eps) * step.correction;
  return fmaf(w, a.decay, -quotient(a.lr * m, denominator));
}

// Rounds w up or down to a bfloat16 number at random. The upper 16 bits of a random word are added to the lower 16 bits
// of w, which bfloat16 does not have.
__device__ __forceinline__ float rounded(float w, uint32_t word) {
  const uint32_t bits = __float_as_uint(w);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? __uint_as_float((bits + (word >> 16)) & 0xffff0000u) : w;
}

// A pack of a 16-bit type is two quads. Two neighbouring lanes exchange two of their four quads: the even lane then has
// the first quad of both packs, and the odd lane the second. So neighbouring lanes have neighbouring quads, and their
// accesses of the moments fill whole sectors of memory. A second call undoes the first. All lanes of a warp must call.
template <class T>
__device__ __forceinline__ void swap_quads(float (&pack)[kPack<T>]) {
  if constexpr (kPack<T> == 2 * kQuad) {
    const bool odd = threadIdx.x % 2;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float got = __shfl_xor_sync(kAllLanes, odd ? pack[i] : pack[kQuad + i], 1);
      (odd ? pack[i] : pack[kQuad + i]) = got;
    }
  }
}

// The numbers that lanes must hold together: two packs if quads are swapped, else one.
template <class T>
constexpr int kTogether = kPack<T> == kQuad ? kQuad : 2 * kPack<T>;

// The place of a lane's quad q after swap_quads, if its pack was at `at`.
template <class T>
__device__ __forceinline__ int64_t place(int64_t at, int q) {
  return kPack<T> == kQuad ? at : at - int(threadIdx.x % 2) * kQuad + q * kPack<T>;
}

// Updates the thread's packs of the numbers from `first` up to, but without, `end`. Their count is a multiple of
// kTogether.
template <class T, bool kStochastic>
__device__ __forceinline__ void update_packs(const AdamwArgs& a, const Step& step, const Numbers<T>& of, int64_t first,
                                             int64_t end) {
  constexpr int kSteps = kAdamwNumbers / (kThreads * kPack<T>), kQuads = kPack<T> / kQuad;
  const int64_t begin = first + threadIdx.x * kPack<T>;
  float w[kSteps][kPack<T>] = {}, g[kSteps][kPack<T>] = {};
  float m[kSteps][kQuads][kQuad] = {}, v[kSteps][kQuads][kQuad] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t at = begin + s * kThreads * kPack<T>;
    if (at >= end) continue;
    load<T, kPack<T>>(of.weights + at, w[s]);
    load<T, kPack<T>>(of.gradients + at, g[s]);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      load<float, kQuad>(of.firsts + place<T>(at, q), m[s][q]);
      load<float, kQuad>(of.seconds + place<T>(at, q), v[s][q]);
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t at = begin + s * kThreads * kPack<T>;
    swap_quads<T>(w[s]);
    swap_quads<T>(g[s]);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        float& weight = w[s][q * kQuad + i];
        weight = updated(a, step, weight, g[s][q * kQuad + i], m[s][q][i], v[s][q][i]);
      }
      if constexpr (kStochastic) {
        const Philox noise(step.key, uint64_t(place<T>(at, q)) / kQuad, step.counter);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) w[s][q * kQuad + i] = rounded(w[s][q * kQuad + i], noise.word[i]);
      }
    }
    swap_quads<T>(w[s]);
    if (at >= end) continue;
    store<T, kPack<T>>(of.weights + at, w[s]);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      store<float, kQuad>(of.firsts + place<T>(at, q), m[s][q]);
      store<float, kQuad>(of.seconds + place<T>(at, q), v[s][q]);
    }
  }
}

// Updates the thread's numbers from `first` up to, but without, `end`, one at a time.
template <class T, bool kStochastic>
__device__ __forceinline__ void update_singles(const AdamwArgs& a, const Step& step, const Numbers<T>& of,
                                               int64_t first, int64_t end) {
#pragma unroll 1
  for (int64_t at = first + threadIdx.x; at < end; at += kThreads) {
    float m = of.firsts[at], v = of.seconds[at];
    float w = updated(a, step, widen(of.weights[at]), widen(of.gradients[at]), m, v);
    of.firsts[at] = m, of.seconds[at] = v;
    if constexpr (kStochastic) {
      const Philox noise(step.key, uint64_t(at) / kQuad, step.counter);
      const uint32_t low = at % 2 ? noise.word[1] : noise.word[0], high = at % 2 ? noise.word[3] : noise.word[2];
      w = rounded(w, at % kQuad < 2 ? low : high);
    }
    of.weights[at] = narrow<T>(w);
  }
}

template <class T, int kWidth, bool kStochastic>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamwArgs a) {
  const Share share(a.tensors, a.programs, kAdamwNumbers);
  const Step step(a, share.tensor);
  const Numbers<T> of(share);
  int64_t done = share.first;
  if constexpr (kWidth > 1) {
    done = share.end_of_groups(kTogether<T>);
    update_packs<T, kStochastic>(a, step, of, share.first, done);
  }
  update_singles<T, kStochastic>(a, step, of, done, share.end);
}

}  // namespace

cudaError_t adamw_(const AdamwArgs& a, cudaStream_t stream) {
  if (!fits_grid(a.P)) return cudaErrorInvalidValue;
  if (a.P == 0) return cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* kernel = a.aligned ? adamw_kernel<T, kPack<T>, false> : adamw_kernel<T, 1, false>;
    if constexpr (std::is_same_v<T, bfloat16>)
      if (a.seed) kernel = a.aligned ? adamw_kernel<T, kPack<T>, true> : adamw_kernel<T, 1, true>;
    kernel<<<unsigned(a.P), kThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the struct.
extern "C" int gpt2fast_adamw_(const int64_t* tensors, const int32_t* programs, const float* step, const float* scale,
                               const int64_t* seed, int64_t P, int64_t aligned, float lr, float beta2, float rest1,
                               float rest2, float log_beta1, float log_beta2, float eps, float decay, int64_t dtype,
                               cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::adamw_({.tensors = tensors,
                       .programs = programs,
                       .step = step,
                       .scale = scale,
                       .seed = seed,
                       .P = P,
                       .aligned = aligned != 0,
                       .lr = lr,
                       .beta2 = beta2,
                       .rest1 = rest1,
                       .rest2 = rest2,
                       .log_beta1 = log_beta1,
                       .log_beta2 = log_beta2,
                       .eps = eps,
                       .decay = decay,
                       .dtype = DType(dtype)},
                      stream);
}
