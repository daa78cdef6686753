// CUDA's intrinsics by the dozen, for test_cuda_language.py: a kernel writes the k-th result of thread t to out[k][t].
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <stdint.h>

namespace cg = cooperative_groups;

template <typename T>
struct Results {
  T* out;
  int k;
  __device__ void operator()(T v) { out[k++ * blockDim.x + threadIdx.x] = v; }
};

extern "C" __global__ void halves(const __half* x, const __half* y, __half* out) {
  __half a = x[threadIdx.x], b = y[threadIdx.x];
  Results<__half> put{out, 0};
  put(__hadd(a, b)), put(__hsub(a, b)), put(__hmul(a, b)), put(__hfma(a, b, a)), put(__hdiv(a, b));
  put(__hmax(a, b)), put(__hmin(a, b)), put(__hneg(a)), put(__habs(a)), put(__hadd_sat(a, b)),
      put(__hfma_relu(a, b, a));
  put(__hlt(a, b) ? a : b), put(hfloor(a)), put(hrint(a)), put(__int2half_rn(__half2int_rz(a)));
  put(hexp(a)), put(hexp2(a)), put(hlog(__habs(a))), put(hsqrt(__habs(a))), put(hrcp(a)), put(hsin(a)), put(htanh(a));
}

template <typename Pair>
__device__ void pairs(const Pair* x, const Pair* y, Pair* out) {
  Pair a = x[threadIdx.x], b = y[threadIdx.x];
  Results<Pair> put{out, 0};
  put(__hadd2(a, b)), put(__hsub2(a, b)), put(__hmul2(a, b)), put(__hfma2(a, b, a)), put(__h2div(a, b));
  put(__hmax2(a, b)), put(__hmin2(a, b)), put(__hneg2(a)), put(__habs2(a)), put(__hgt2(a, b));
  put(h2exp(a)), put(h2sqrt(__habs2(a)));
}
extern "C" __global__ void half_pairs(const __half2* x, const __half2* y, __half2* out) { pairs(x, y, out); }
extern "C" __global__ void bfloat_pairs(const __nv_bfloat162* x, const __nv_bfloat162* y, __nv_bfloat162* out) {
  pairs(x, y, out);
}

extern "C" __global__ void floats(const float* x, const float* y, float* out) {
  float a = x[threadIdx.x], b = y[threadIdx.x];
  Results<float> put{out, 0};
  put(expf(a)), put(exp2f(a)), put(logf(fabsf(a))), put(log1pf(fabsf(a))), put(powf(fabsf(a), b)), put(sinf(a));
  put(sinf(a * 1e6f)), put(cosf(a)), put(tanf(a)), put(tanhf(a)), put(erff(a)), put(sqrtf(fabsf(a)));
  put(rsqrtf(fabsf(a))), put(a / b), put(fmodf(a, b)), put(hypotf(a, b)), put(atan2f(a, b)), put(lgammaf(fabsf(a) + 1));
  put(floorf(a)), put(rintf(a)), put(truncf(a)), put(fminf(a, b)), put(copysignf(a, b)), put(ldexpf(a, 3));
  put(__saturatef(a)), put(__expf(a)), put(__fdividef(a, b)), put(float(__float2int_rn(a)));
  put(float(static_cast<long long>(a * 1e6f))), put(float(static_cast<int8_t>(static_cast<int>(a * 10))));
}

// In every mode of rounding: sums, products, quotients, roots.
extern "C" __global__ void rounded(const float* x, const float* y, float* out) {
  float a = x[threadIdx.x], b = y[threadIdx.x], c = fabsf(a);
  Results<float> put{out, 0};
  put(__fadd_rn(a, b)), put(__fadd_rz(a, b)), put(__fadd_rd(a, b)), put(__fadd_ru(a, b));
  put(__fmul_rn(a, b)), put(__fmul_rz(a, b)), put(__fmul_rd(a, b)), put(__fmul_ru(a, b));
  put(__fdiv_rn(a, b)), put(__fdiv_rz(a, b)), put(__fdiv_rd(a, b)), put(__fdiv_ru(a, b));
  put(__fsqrt_rn(c)), put(__fsqrt_rz(c)), put(__fsqrt_rd(c)), put(__fsqrt_ru(c));
  put(__fmaf_rn(a, b, c)), put(__fmaf_rz(a, b, c)), put(__fmaf_rd(a, b, c)), put(__fmaf_ru(a, b, c));
}

extern "C" __global__ void doubles(const double* x, const double* y, double* out) {
  double a = x[threadIdx.x], b = y[threadIdx.x];
  Results<double> put{out, 0};
  put(a + b), put(a * b), put(a / b), put(fma(a, b, a)), put(sqrt(fabs(a))), put(rsqrt(fabs(a))), put(exp(a));
  put(log(fabs(a))), put(sin(a)), put(cos(a)), put(atan(a)), put(tanh(a)), put(erf(a)), put(pow(fabs(a), b));
  put(floor(a)), put(fmin(a, b)), put(__drcp_rn(b)), put(double(int(a))), put(double(float(a)));
  put(double(static_cast<long long>(a * 1e9))), put(double(static_cast<unsigned long long>(fabs(a) * 1e9)));
}

extern "C" __global__ void integers(const int* x, const int* y, int* out) {
  int a = x[threadIdx.x], b = y[threadIdx.x];
  unsigned ua = a, ub = b;
  long long p = static_cast<long long>(a) * b;
  Results<int> put{out, 0};
  put(a / b), put(a % b), put(ua / ub), put(ua % ub), put(int(p / 77)), put(int(p % 1013)), put(int(p >> 13));
  put(__mulhi(a, b)), put(__umulhi(ua, ub)), put(__mul24(a, b)), put(int(__int128(a) * b * a >> 40));
  put(__popc(a)), put(__clz(a)), put(__ffs(a)), put(__brev(a)), put(__popcll(p)), put(__clzll(p)),
      put(int(__brevll(p)));
  put(__byte_perm(a, b, 0x5140)), put(__funnelshift_l(a, b, b & 31)), put(a << (b & 31)), put(ua >> (b & 31));
  put(a >> (b & 31)), put(__dp4a(a, b, 7)), put(__vadd4(a, b)), put(__vmaxs4(a, b)), put(__sad(a, b, 3));
  put(__usad(ua, ub, 2)), put(min(a, b)), put(abs(a)), put(__hadd(a, b)), put(__rhadd(a, b)), put(int16_t(a));
  put(int8_t(a)), put(__float_as_int(float(a)));
}

extern "C" __global__ void warps(const int* x, int* out) {
  int a = x[threadIdx.x];
  Results<int> put{out, 0};
  put(__shfl_xor_sync(~0u, a, 5)), put(__shfl_sync(~0u, a, a & 31)), put(__reduce_add_sync(~0u, a));
  put(int(__shfl_xor_sync(~0u, double(a), 1))), put(__ballot_sync(~0u, a > 0)), put(__match_any_sync(~0u, a & 3));
  auto block = cg::this_thread_block();
  auto warp = cg::tiled_partition<32>(block);
  auto four = cg::tiled_partition<4>(block);
  put(cg::reduce(warp, a, cg::plus<int>())), put(cg::reduce(four, a, cg::greater<int>()));
  put(warp.thread_rank()), put(four.meta_group_rank());
  block.sync();
  put(__syncthreads_count(a > 0)), put(__syncthreads_or(a > 90)), put(__syncthreads_and(a > -200));
  if (a & 1) {
    put(cg::coalesced_threads().size());
  } else {
    put(-1);
  }
}

// Two buffers in flight; n steps of 128 values, each read back to front.
extern "C" __global__ void pipeline(const float* x, float* out, int n) {
  __shared__ float s[2][128];
  int t = threadIdx.x;
  for (int k = 0; k < 2; ++k) {
    __pipeline_memcpy_async(&s[k][t], x + k * 128 + t, 4);
    __pipeline_commit();
  }
  float sum = 0;
  for (int k = 0; k < n; ++k) {
    __pipeline_wait_prior(1);
    __syncthreads();
    sum += s[k & 1][127 - t];
    __syncthreads();
    if (k + 2 < n) __pipeline_memcpy_async(&s[k & 1][t], x + (k + 2) * 128 + t, 4);
    __pipeline_commit();
  }
  out[t] = sum;
}

__device__ __noinline__ int fibonacci(int n) {
  int a = 0, b = 1;
  for (int i = 0; i < n; ++i) {
    int c = a + b;
    a = b;
    b = c;
  }
  return a;
}
struct Ten {
  int v[10];
};
__device__ __noinline__ Ten multiples(int n) {
  Ten t;
  for (int i = 0; i < 10; ++i) t.v[i] = n * i;
  return t;
}
__constant__ int table[4] = {1, 2, 3, 4};

// Calls, structs by value, local and constant memory, a switch.
extern "C" __global__ void calls(int* out, int n) {
  int t = threadIdx.x, local[16], s = 0;
  for (int i = 0; i < 16; ++i) local[i] = i * t;
  for (int i = 0; i < n; ++i) s += local[(i * 7 + t) & 15];
  int v = s + fibonacci(t & 15) + multiples(t).v[t % 10] + table[t & 3];
  switch (t & 7) {
    case 0:
      v += 1;
      break;
    case 1:
      v *= 2;
      break;
    case 2:
      v -= 5;
      break;
    case 3:
      v ^= 3;
      break;
    case 4:
      v = ~v;
      break;
    case 5:
      v <<= 1;
      break;
    default:
      v = 0;
  }
  out[t] = v;
}

// ldmatrix on rows of `stride` halves: 64 lie in the same banks, 72 do not.
extern "C" __global__ void load_matrix(unsigned* out, int stride) {
  __shared__ __align__(16) __half s[32 * 72];
  for (int i = threadIdx.x; i < 32 * stride; i += 32) s[i] = __int2half_rn(i % stride);
  __syncwarp();
  unsigned at = __cvta_generic_to_shared(s + threadIdx.x * stride), r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));  // the load: nvcc gives it its last line
  for (int k = 0; k < 4; ++k) out[k * 32 + threadIdx.x] = r[k];
}

// Half of the block goes home before the barrier.
extern "C" __global__ void leaves_early(int* out) {
  if (threadIdx.x < 64) return;
  __syncthreads();  // the barrier
  out[threadIdx.x] = 1;
}
