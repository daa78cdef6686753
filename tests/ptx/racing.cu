// Kernels whose blocks or warps meet in global memory, right where BUG is 0. The line that the machine must name ends
// in "bug: NAME", the other line of a race in "other: NAME".
constexpr bool kBug = BUG;

extern "C" __global__ void accumulate(const float* x, float* o) {
  int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (kBug) {
    float before = o[t];   // bug: accumulate
    o[t] = before + x[i];  // other: accumulate
  } else {
    atomicAdd(&o[t], x[i]);
  }
}

extern "C" __global__ void apart(const float* x, float* o) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  o[i] = o[i] + x[i];
}

// The block that comes last adds up what the blocks have left.
extern "C" __global__ void last_block_sums(const float* x, float* parts, unsigned* count, float* o) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = x[blockIdx.x];  // other: last_block_sums
    if (!kBug) __threadfence();
    last = atomicAdd(count, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 32) {
    float sum = 0;
    for (int b = 0; b < gridDim.x; ++b) {
      sum += parts[b];  // bug: last_block_sums
    }
    *o = sum;
  }
}

extern "C" __global__ void lock(const float* x, int* held, float* o) {
  if (threadIdx.x == 0) {
    while (atomicCAS(held, 0, 1) != 0) {
    }
    if (!kBug) __threadfence();
    float before = *o;            // bug: lock
    *o = before + x[blockIdx.x];  // other: lock
    if (!kBug) __threadfence();
    atomicExch(held, 0);
  }
}

// Each block waits for the sum of those before it and passes its own on (decoupled look-back, one step).
extern "C" __global__ void look_back(const float* x, volatile int* flags, float* sums) {
  if (threadIdx.x == 0) {
    int b = blockIdx.x;
    float before = 0;
    if (b > 0) {
      while (flags[b - 1] == 0) {
      }
      __threadfence();
      before = sums[b - 1];  // bug: look_back
    }
    sums[b] = before + x[b];  // other: look_back
    if (!kBug) __threadfence();
    flags[b] = 1;
  }
}

extern "C" __global__ void same_value(float* o) {
  o[threadIdx.x] = 3.0f;  // bug: same_value
}

extern "C" __global__ void last_one_wins(float* o) {
  o[threadIdx.x] = float(blockIdx.x);  // bug: last_one_wins
}

extern "C" __global__ void within_a_block(const float* x, float* o, float* y) {
  int t = threadIdx.x;
  o[t] = x[t];  // other: within_a_block
  if (!kBug) __syncthreads();
  y[t] = o[127 - t];  // bug: within_a_block
}

// Blocks run in order, so the one before the last never comes.
extern "C" __global__ void waits_for_the_next(volatile int* flags) {
  flags[blockIdx.x] = 1;
  if (threadIdx.x == 0 && blockIdx.x + 1 < gridDim.x) {
    while (flags[blockIdx.x + 1] == 0) {  // bug: waits_for_the_next
    }
  }
}
