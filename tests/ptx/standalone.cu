// The kernels without torch and without Python: layer norm, and causal attention of its result with itself.
// nvcc -std=c++20 standalone.cu layer_norm.cu attention.cu
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/kernels.h"

namespace {

constexpr int kT = 40, kH = 2, kD = 32, kC = kH * kD;  // tokens, heads, head size, columns
constexpr float kEps = 1e-5f;

// What a program has of the device: n floats, or nullptr where there is no memory.
float* device(int n, const float* from = nullptr) {
  float* made = nullptr;
  if (cudaMalloc(&made, n * sizeof(float)) != cudaSuccess) return nullptr;
  if (from && cudaMemcpy(made, from, n * sizeof(float), cudaMemcpyHostToDevice) != cudaSuccess) return nullptr;
  return made;
}

// softmax(q k^T / sqrt(D)) v in double, where q, k and v are columns h D ... of y, for one query and one column.
double expected(const std::vector<double>& y, int query, int column) {
  const int h = column / kD;
  double sum = 0, weighted = 0;
  for (int key = 0; key <= query; ++key) {
    double score = 0;
    for (int d = 0; d < kD; ++d) score += y[query * kC + h * kD + d] * y[key * kC + h * kD + d];
    const double p = std::exp(score / std::sqrt(double(kD)));
    sum += p, weighted += p * y[key * kC + column];
  }
  return weighted / sum;
}

}  // namespace

// 0, or what went wrong: a CUDA error, or -1 where a result is not the expected one.
extern "C" int gpt2fast_standalone(float tolerance) {
  using namespace gpt2fast;
  std::vector<float> x(kT * kC), ones(kC, 1), zeros(kC, 0), out(kT * kC);
  for (int i = 0; i < kT * kC; ++i) x[i] = std::sin(0.37f * i) + 0.01f * (i % 7);
  float *dx = device(kT * kC, x.data()), *weight = device(kC, ones.data()), *bias = device(kC, zeros.data());
  float *y = device(kT * kC), *mean = device(kT), *rstd = device(kT), *dout = device(kT * kC), *lse = device(kH * kT);
  if (!dx || !weight || !bias || !y || !mean || !rstd || !dout || !lse) return cudaErrorMemoryAllocation;

  LayerNormArgs norm = {.x = dx, .weight = weight, .bias = bias, .y = y, .mean = mean, .rstd = rstd};
  norm.R = kT, norm.C = kC, norm.stride_x_r = kC, norm.eps = kEps, norm.dtype = DType::kFloat32;
  if (cudaError_t status = cuda::layer_norm(norm, nullptr)) return status;
  AttentionArgs attention = {
      .q = y, .k = y, .v = y, .out = dout, .lse = lse, .B = 1, .T = kT, .S = kT, .H = kH, .D = kD};
  for (int64_t* stride : {attention.stride_q, attention.stride_k, attention.stride_v})
    stride[0] = kT * kC, stride[1] = kC, stride[2] = kD;
  attention.causal = true, attention.scale = 1 / std::sqrt(float(kD)), attention.dtype = DType::kFloat32;
  if (cudaError_t status = cuda::attention(attention, nullptr)) return status;
  if (cudaError_t status = cudaMemcpy(out.data(), dout, out.size() * sizeof(float), cudaMemcpyDeviceToHost))
    return status;

  std::vector<double> exact(kT * kC);
  for (int t = 0; t < kT; ++t) {
    double sum = 0, squares = 0;
    for (int c = 0; c < kC; ++c) sum += x[t * kC + c];
    for (int c = 0; c < kC; ++c) squares += std::pow(x[t * kC + c] - sum / kC, 2);
    for (int c = 0; c < kC; ++c) exact[t * kC + c] = (x[t * kC + c] - sum / kC) / std::sqrt(squares / kC + kEps);
  }
  double worst = 0;
  for (int t = 0; t < kT; ++t)
    for (int c = 0; c < kC; ++c) worst = std::fmax(worst, std::fabs(out[t * kC + c] - expected(exact, t, c)));
  std::printf("layer norm and attention of %d tokens, head size %d: off by %.2g at most\n", kT, kD, worst);
  for (float* p : {dx, weight, bias, y, mean, rstd, dout, lse}) cudaFree(p);
  return worst <= tolerance ? 0 : -1;
}

int main() { return gpt2fast_standalone(32 * FLT_EPSILON); }  // of numbers up to 3
