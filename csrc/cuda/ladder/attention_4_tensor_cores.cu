// tensor cores: one instruction multiplies 16 x 16 by 16 x 8 numbers.
//
// As before, but a warp has 16 queries for itself and multiplies fragments of whole tiles (tensor_cores.cuh). A number
// that comes from shared memory is used 16 times and not once or four times, and rows move 16 bytes at a time. Two
// barriers a tile remain: between them every warp waits for memory.
//
// Lower: requests, asked, moved, shared, turns, barriers, shuffles, waited

#include "tensor_cores.cuh"

using namespace ladder;

SIMT_DEVICE void fetch(bfloat* tile, const bfloat* from, int count) {
    for (int i = 8 * threadIdx.x; i < kKeys * D; i += 8 * kThreads) {
        const int row = i / D;
        const auto numbers = row < count ? simt::load<bfloat, 8>(from + i) : simt::Vector<bfloat, 8>{};
        simt::store<bfloat, 8>(tile + row * kPitch + i % D, numbers);
    }
}

__global__ void __launch_bounds__(kThreads) tensor_cores(Attention a) {
    SIMT_SHARED(bfloat, q, kQueries * kPitch);
    SIMT_SHARED(bfloat, k, kKeys * kPitch);
    SIMT_SHARED(bfloat, v, kKeys * kPitch);
    const int t0 = blockIdx.x * kQueries, first = threadIdx.x / 32 * 16;
    const int64_t head = int64_t{blockIdx.y} * a.T * D;
    fetch(q, a.q + head + t0 * D, a.T - t0);
    __syncthreads();
    Warp warp(q + first * kPitch);
    for (int s0 = 0; s0 <= t0; s0 += kKeys) {
        if (s0 > 0) __syncthreads();  // the tile before is done with
        fetch(k, a.k + head + s0 * D, a.T - s0);
        fetch(v, a.v + head + s0 * D, a.T - s0);
        __syncthreads();
        warp.meet(k, v, s0 - t0 - first);
    }
    warp.put(a.y + head + (t0 + first) * D, a.T - t0 - first);
}

static void attention(const Attention& a, simt::Stream stream) {
    simt::launch("tensor cores", tensor_cores, dim3(divided(a.T, kQueries), a.heads), dim3(kThreads), 0, stream, a);
}

TINYGPT_RUNG(Attention, attention)
