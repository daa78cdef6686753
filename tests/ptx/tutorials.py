"""Kernels in the style of Triton's tutorials, each with the wrapper that a user would write. None knows the machine."""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask) + tl.load(y_ptr + at, mask=mask), mask=mask)


def add(x, y, block=128):
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


@triton.jit
def softmax_kernel(out_ptr, x_ptr, stride_x, stride_out, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        column = tl.arange(0, BLOCK)
        mask = column < columns
        x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=-float("inf"))
        e = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * stride_out + column, e / tl.sum(e, axis=0), mask=mask)


def softmax(x, programs=3):
    rows, columns = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    softmax_kernel[(min(programs, rows),)](
        out, x, x.stride(0), out.stride(0), rows, columns, BLOCK=block, STAGES=2, num_warps=4
    )
    return out


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=k[None, :] < K - step * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if LEAKY:
        total = tl.where(total >= 0, total, 0.01 * total)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m[:, None] < M) & (n[None, :] < N)
    c = total.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + m[:, None] * stride_cm + n[None, :] * stride_cn, c, mask=mask)


def matmul(a, b, leaky=False, precision="ieee", block=(64, 32, 32), stages=3):
    (M, K), N = a.shape, b.shape[1]
    out = torch.empty((M, N), dtype=a.dtype)
    tiles = triton.cdiv(M, block[0]) * triton.cdiv(N, block[1])
    matmul_kernel[(tiles,)](
        a, b, out, M, N, K, *a.stride(), *b.stride(), *out.stride(), *block, GROUP=2, PRECISION=precision,
        LEAKY=leaky, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask)
    tl.store(out_ptr + at, tl.where(tl.rand(seed, at) > p, x / (1 - p), 0.0), mask=mask)


def dropout(x, p, seed):
    out = torch.empty_like(x)
    dropout_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), p, seed, BLOCK=256)
    return out


@triton.jit
def layer_norm_kernel(x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * stride
    y_ptr += row * stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / N
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        x = tl.where(at < N, x - mean, 0.0)
        square += x * x
    rstd = 1 / tl.sqrt(tl.sum(square, axis=0) / N + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < N
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(w_ptr + at, mask=mask) + tl.load(b_ptr + at, mask=mask)
        tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def layer_norm_dx_kernel(
    dx_ptr, dy_ptr, partial_dw_ptr, partial_db_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, lock_ptr, stride, N,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < N
    x = tl.load(x_ptr + row * stride + at, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride + at, mask=mask, other=0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=mask).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normal = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    wdy = tl.where(mask, w * dy, 0.0)
    c1, c2 = tl.sum(normal * wdy, axis=0) / N, tl.sum(wdy, axis=0) / N
    tl.store(dx_ptr + row * stride + at, (wdy - (normal * c1 + c2)) * rstd, mask=mask)
    # rows of one group add their shares in turn, under a lock
    group = row % GROUPS
    lock_ptr += group
    count_ptr = lock_ptr + GROUPS
    partial_dw_ptr += group * N + at
    partial_db_ptr += group * N + at
    dw, db = dy * normal, dy
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    if tl.load(count_ptr) == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        dw += tl.load(partial_dw_ptr, mask=mask)
        db += tl.load(partial_db_ptr, mask=mask)
    tl.store(partial_dw_ptr, dw, mask=mask)
    tl.store(partial_db_ptr, db, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def layer_norm_dwdb_kernel(
    partial_dw_ptr, partial_db_ptr, dw_ptr, db_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < M) & (n[None, :] < N)
        at = m[:, None] * N + n[None, :]
        dw += tl.load(partial_dw_ptr + at, mask=mask, other=0.0)
        db += tl.load(partial_db_ptr + at, mask=mask, other=0.0)
    tl.store(dw_ptr + n, tl.sum(dw, axis=0), mask=n < N)
    tl.store(db_ptr + n, tl.sum(db, axis=0), mask=n < N)


def layer_norm(x, weight, bias, eps=1e-5):
    M, N = x.shape
    y, mean, rstd = torch.empty_like(x), torch.empty(M), torch.empty(M)
    layer_norm_kernel[(M,)](x, y, weight, bias, mean, rstd, x.stride(0), N, eps, BLOCK=64, num_warps=2)
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd, groups=3):
    M, N = x.shape
    locks = torch.zeros(2 * groups, dtype=torch.int32)
    partial_dw, partial_db = torch.zeros(groups, N), torch.zeros(groups, N)
    dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    block = triton.next_power_of_2(N)
    layer_norm_dx_kernel[(M,)](
        dx, dy, partial_dw, partial_db, x, weight, mean, rstd, locks, x.stride(0), N, groups, block, num_warps=4
    )
    layer_norm_dwdb_kernel[(triton.cdiv(N, 64),)](partial_dw, partial_db, dw, db, min(groups, M), N, 32, 64)
    return dx, dw, db


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, T,
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(1) * T * D
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + base + m[:, None] * D + d[None, :], mask=m[:, None] < T, other=0.0)
    highest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    end = min(T, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else T
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + base + n[:, None] * D + d[None, :], mask=n[:, None] < T, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = n[None, :] < T
        if CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(highest, tl.max(s, axis=1))
        p = tl.exp(s - top[:, None])
        shrink = tl.exp(highest - top)
        weight = weight * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + base + n[:, None] * D + d[None, :], mask=n[:, None] < T, other=0.0)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None])
        highest = top
    out = total / weight[:, None]
    tl.store(out_ptr + base + m[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=m[:, None] < T)
    tl.store(lse_ptr + tl.program_id(1) * T + m, highest + tl.log(weight), mask=m < T)


def attention(q, k, v, causal, block=(64, 32), warps=4):
    B, H, T, D = q.shape
    out, lse = torch.empty_like(q), torch.empty(B, H, T)
    attention_kernel[(triton.cdiv(T, block[0]), B * H)](
        q, k, v, out, lse, D**-0.5, T, D, causal, *block, num_warps=warps, num_stages=2
    )
    return out, lse


@triton.jit
def attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, scale, T,
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys and walks the queries; dq is added up by atomics, as in the older tutorial."""
    base = tl.program_id(1) * T * D
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    k = tl.load(k_ptr + base + n[:, None] * D + d[None, :], mask=n[:, None] < T, other=0.0)
    v = tl.load(v_ptr + base + n[:, None] * D + d[None, :], mask=n[:, None] < T, other=0.0)
    dk = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    first = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    for start in range(first, T, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        at = base + m[:, None] * D + d[None, :]
        q = tl.load(q_ptr + at, mask=m[:, None] < T, other=0.0)
        dout = tl.load(dout_ptr + at, mask=m[:, None] < T, other=0.0)
        lse = tl.load(lse_ptr + tl.program_id(1) * T + m, mask=m < T, other=float("inf"))
        delta = tl.load(delta_ptr + tl.program_id(1) * T + m, mask=m < T, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        p = tl.exp(s - lse[:, None])
        p = tl.where(n[None, :] < T, p, 0.0)
        if CAUSAL:
            p = tl.where(n[None, :] <= m[:, None], p, 0.0)
        dv += tl.dot(tl.trans(p.to(dout.dtype)), dout)
        ds = (p * (tl.dot(dout, tl.trans(v)) - delta[:, None]) * scale).to(q.dtype)
        dk += tl.dot(tl.trans(ds), q)
        tl.atomic_add(dq_ptr + at, tl.dot(ds, k), mask=m[:, None] < T)
    at = base + n[:, None] * D + d[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=n[:, None] < T)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=n[:, None] < T)


def attention_backward(dout, q, k, v, out, lse, causal, block=(32, 32)):
    B, H, T, D = q.shape
    delta = (dout.float() * out.float()).sum(-1)
    dq = torch.zeros(B, H, T, D)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    attention_backward_kernel[(triton.cdiv(T, block[1]), B * H)](
        q, k, v, dout, lse, delta, dq, dk, dv, D**-0.5, T, D, causal, *block, num_warps=4, num_stages=2
    )
    return dq.to(q.dtype), dk, dv
