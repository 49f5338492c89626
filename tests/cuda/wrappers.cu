// Small kernels for tests of simt.cuh itself: what each wrapper computes, and what the simulation must not let pass.

#include <cstring>

#include "cuda/simt.cuh"
#include "wrappers.h"

namespace {

// ------------------------------------------------------------------------------------------------- what wrappers
// compute

template <class T>
__global__ void mma_fragments(const uint32_t* in, const float* start, float* out) {  // in: [32, 6], a then b
    const int lane = threadIdx.x;
    const uint32_t a[4] = {in[lane * 6], in[lane * 6 + 1], in[lane * 6 + 2], in[lane * 6 + 3]};
    const uint32_t b[2] = {in[lane * 6 + 4], in[lane * 6 + 5]};
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = start[lane * 4 + i];
    simt::mma<T>(d, a, b);
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}

template <int N, bool TRANSPOSED>
__global__ void load_matrices(const uint16_t* in, uint32_t* out) {  // in: [N, 8, 8]
    SIMT_SHARED(uint16_t, tile, 4 * 64);
    const int lane = threadIdx.x;
    for (int i = lane; i < N * 64; i += 32) tile[i] = in[i];
    __syncthreads();
    uint32_t r[N];
    const uint16_t* row = tile + lane % (8 * N) * 8;
    if (TRANSPOSED)
        simt::ldmatrix_transposed(r, row);
    else
        simt::ldmatrix(r, row);
    for (int i = 0; i < N; ++i) out[lane * N + i] = r[i];
}

__global__ void shuffles(const float* in, float* out) {  // out: [4, 32]
    const int lane = threadIdx.x;
    const float x = in[lane];
    out[lane] = __shfl_xor_sync(~0u, x, 5);
    out[32 + lane] = __shfl_sync(~0u, x, (3 * lane + 1) % 32);
    out[64 + lane] = __shfl_down_sync(~0u, x, 7);
    out[96 + lane] = simt::warp_sum(x);
}

__global__ void copy_groups(const float* in, float* out) {  // in: [3, 128]; out: [3, 128], a row as each wait shows it
    SIMT_SHARED(float, tile, 3 * 128);
    const int lane = threadIdx.x;
    for (int group = 0; group < 3; ++group) {
        simt::cp_async16(tile + group * 128 + lane * 4, in + group * 128 + lane * 4, group < 2 || lane % 2 == 0);
        simt::cp_async_commit();
    }
    simt::cp_async_wait<2>();
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = tile[lane * 4 + i];
    simt::cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) out[128 + lane * 4 + i] = tile[128 + lane * 4 + i];
    simt::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[256 + lane * 4 + i] = tile[256 + lane * 4 + i];
}

template <class T>
__global__ void packs(const float* in, uint32_t* out, float* back) {
    const int lane = threadIdx.x;
    out[lane] = simt::pack2<T>(in[2 * lane], in[2 * lane + 1]);
    back[lane] = simt::to_float(simt::from_float<T>(in[2 * lane]));
}

// 16 bytes a lane, then 8.
__global__ void stores(const float* in, float* out) {
    const int lane = threadIdx.x;
    simt::store_global<float, 4>(out + 4 * lane, simt::load<float, 4>(in + 4 * lane));
    simt::store_global<float, 2>(out + 128 + 2 * lane, simt::load<float, 2>(in + 128 + 2 * lane));
}

__global__ void powers(const float* in, float* out) { out[threadIdx.x] = simt::exp2_fast(in[threadIdx.x]); }

__global__ void count_atomically(float* out) { atomicAdd(out, 1.0f); }

__global__ void coordinates(float* out) {  // grid (2, 2), block (4, 2, 3)
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int block = blockIdx.x + gridDim.x * blockIdx.y;
    out[block * 24 + thread] =
        threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y;
}

// -------------------------------------------------------------------------------------------------- what must not pass
// All of one block of 64 threads; `in` and `out` hold 64 floats.

__global__ void reversed(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void race(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

__global__ void race_after_read(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x ^ 32];
    tile[threadIdx.x] = 0.0f;
}

__global__ void shuffle_as_fence(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x] = in[threadIdx.x];
    const float zero = 0.0f * __shfl_xor_sync(~0u, 1.0f, 1);
    out[threadIdx.x] = tile[threadIdx.x ^ 1] + zero;
}

__global__ void warp_fence(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void divergent(const float* in, float* out) {
    float x = in[threadIdx.x];
    if (threadIdx.x % 2)
        x = __shfl_xor_sync(~0u, x, 1);
    else
        x = __shfl_xor_sync(~0u, x, 2);
    out[threadIdx.x] = x;
}

__global__ void exited(const float* in, float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}

__global__ void not_in_mask(const float* in, float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 1);
}

__global__ void exited_barrier(const float* in, float* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers(const float* in, float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_and_shuffle(const float* in, float* out) {
    float x = in[threadIdx.x];
    if (threadIdx.x == 40)
        __syncthreads();
    else
        x = __shfl_xor_sync(~0u, x, 1);
    out[threadIdx.x] = x;
}

__global__ void too_much_shared(const float* in, float* out) {
    simt::SharedMemory memory;
    float* tile = memory.take<float>(64);
    float* more = memory.take<float>(64);
    tile[threadIdx.x] = more[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_copy(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64 * 4 + 4);
    simt::cp_async16(tile + threadIdx.x * 4, in + 1, threadIdx.x == 0);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    out[threadIdx.x] = tile[threadIdx.x * 4];
}

__global__ void misaligned_matrix(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64 * 4 + 4);
    for (int i = 0; i < 4; ++i) tile[threadIdx.x * 4 + i] = in[threadIdx.x];
    __syncthreads();
    uint32_t r[4];
    simt::ldmatrix(r, tile + 1 + threadIdx.x % 32 * 4);
    out[threadIdx.x] = static_cast<float>(r[0]);
}

__global__ void misaligned_vector(const float* in, float* out) {
    out[threadIdx.x] = threadIdx.x ? 0.0f : simt::load<float, 4>(in + 1).at[0];
}

__global__ void writes_input(const float* in, float* out) {
    const_cast<float*>(in)[threadIdx.x] = 0.0f;
    out[threadIdx.x] = 0.0f;
}

__global__ void past_the_end(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void past_shared(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    tile[threadIdx.x + 1] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = threadIdx.x ? tile[threadIdx.x] : 0.0f;
}

__global__ void between_elements(const float* in, float* out) { out[threadIdx.x * 2 + 1] = in[threadIdx.x]; }

__global__ void uninitialised(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64);
    if (threadIdx.x) tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void reads_output(const float* in, float* out) { out[threadIdx.x] += in[threadIdx.x]; }

__global__ void before_the_wait(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64 * 4);
    simt::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x / 4 * 4);
    simt::cp_async_commit();
    const float early = tile[threadIdx.x * 4];
    simt::cp_async_wait<0>();
    out[threadIdx.x] = early;
}

__global__ void wait_without_barrier(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64 * 4);
    simt::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x / 4 * 4);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    out[threadIdx.x] = tile[(threadIdx.x ^ 32) * 4];
}

__global__ void never_waits(const float* in, float* out) {
    SIMT_SHARED(float, tile, 64 * 4);
    simt::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x / 4 * 4);
    simt::cp_async_commit();
    out[threadIdx.x] = 0.0f;
}

__global__ void adds_without_atomics(const float* in, float* out) { out[0] = out[0] + in[threadIdx.x]; }

__global__ void blocks_share(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }

struct Named {
    const char* name;
    void (*kernel)(const float*, float*);
};
const Named kKernels[] = {
    {"reversed", reversed},
    {"race", race},
    {"race_after_read", race_after_read},
    {"shuffle_as_fence", shuffle_as_fence},
    {"warp_fence", warp_fence},
    {"divergent", divergent},
    {"exited", exited},
    {"not_in_mask", not_in_mask},
    {"exited_barrier", exited_barrier},
    {"two_barriers", two_barriers},
    {"barrier_and_shuffle", barrier_and_shuffle},
    {"too_much_shared", too_much_shared},
    {"misaligned_copy", misaligned_copy},
    {"misaligned_matrix", misaligned_matrix},
    {"misaligned_vector", misaligned_vector},
    {"writes_input", writes_input},
    {"past_the_end", past_the_end},
    {"past_shared", past_shared},
    {"between_elements", between_elements},
    {"uninitialised", uninitialised},
    {"reads_output", reads_output},
    {"before_the_wait", before_the_wait},
    {"wait_without_barrier", wait_without_barrier},
    {"never_waits", never_waits},
    {"adds_without_atomics", adds_without_atomics},
    {"blocks_share", blocks_share},
};

const dim3 kOne(1), kWarp(32);

}  // namespace

namespace wrappers {

bool run(const char* name, const float* in, float* out, int blocks, size_t shared_bytes) {
    for (const Named& named : kKernels)
        if (std::strcmp(named.name, name) == 0) {
            simt::launch(named.name, named.kernel, dim3(blocks), dim3(64), shared_bytes, simt::Stream{}, in, out);
            return true;
        }
    return false;
}

void mma(bool is_bfloat, const uint32_t* in, const float* start, float* out) {
    simt::launch("mma", is_bfloat ? mma_fragments<simt::bfloat> : mma_fragments<simt::half>, kOne, kWarp, 0,
                 simt::Stream{}, in, start, out);
}

void ldmatrix(int count, bool transposed, const uint16_t* in, uint32_t* out) {
    const auto kernel = count == 4 ? (transposed ? load_matrices<4, true> : load_matrices<4, false>)
                                   : (transposed ? load_matrices<2, true> : load_matrices<2, false>);
    simt::launch("ldmatrix", kernel, kOne, kWarp, 0, simt::Stream{}, in, out);
}

void shuffle(const float* in, float* out) {
    simt::launch("shuffle", shuffles, kOne, kWarp, 0, simt::Stream{}, in, out);
}

void copy(const float* in, float* out) { simt::launch("copy", copy_groups, kOne, kWarp, 0, simt::Stream{}, in, out); }

void pack(bool is_bfloat, const float* in, uint32_t* out, float* back) {
    simt::launch("pack", is_bfloat ? packs<simt::bfloat> : packs<simt::half>, kOne, kWarp, 0, simt::Stream{}, in, out,
                 back);
}

void store(const float* in, float* out) { simt::launch("store", stores, kOne, kWarp, 0, simt::Stream{}, in, out); }

void power(const float* in, float* out) { simt::launch("power", powers, kOne, kWarp, 0, simt::Stream{}, in, out); }

void count(float* out) { simt::launch("count", count_atomically, dim3(3), dim3(64), 0, simt::Stream{}, out); }

void number(float* out) { simt::launch("number", coordinates, dim3(2, 2), dim3(4, 2, 3), 0, simt::Stream{}, out); }

}  // namespace wrappers
