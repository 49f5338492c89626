// pipelined: the next tile is on its way while this one is worked on.
//
// cp.async copies from global to shared memory without a register, and without a thread that waits: it is asked for a
// tile ahead, into the other half of shared memory, and waited for when its turn comes. One barrier a tile is enough:
// it says that the new tile is there and the one before it is done with. The same bytes move; only of the first tile,
// and of the queries, does anyone wait for them.
//
// Lower: barriers, waited

#include "tensor_cores.cuh"

using namespace ladder;

SIMT_DEVICE void ask(bfloat* tile, const bfloat* from, int count) {
    for (int i = 8 * threadIdx.x; i < kKeys * D; i += 8 * kThreads)
        simt::cp_async16(tile + i / D * kPitch + i % D, from + i, i / D < count);
}

__global__ void __launch_bounds__(kThreads) pipelined(Attention a) {
    simt::SharedMemory memory;
    bfloat* q = memory.take<bfloat>(kQueries * kPitch);
    bfloat* k = memory.take<bfloat>(2 * kKeys * kPitch);
    bfloat* v = memory.take<bfloat>(2 * kKeys * kPitch);
    const int t0 = blockIdx.x * kQueries, first = threadIdx.x / 32 * 16;
    const int64_t head = int64_t{blockIdx.y} * a.T * D;
    const auto ask_for = [&](int s0) {
        const int half = s0 / kKeys % 2 * kKeys * kPitch;
        ask(k + half, a.k + head + s0 * D, a.T - s0);
        ask(v + half, a.v + head + s0 * D, a.T - s0);
        simt::cp_async_commit();
    };
    ask(q, a.q + head + t0 * D, a.T - t0);
    ask_for(0);
    simt::cp_async_wait<0>();
    __syncthreads();
    Warp warp(q + first * kPitch);
    for (int s0 = 0; s0 <= t0; s0 += kKeys) {
        if (s0 > 0) {
            simt::cp_async_wait<0>();
            __syncthreads();
        }
        if (s0 + kKeys <= t0) ask_for(s0 + kKeys);
        const int half = s0 / kKeys % 2 * kKeys * kPitch;
        warp.meet(k + half, v + half, s0 - t0 - first);
    }
    warp.put(a.y + head + (t0 + first) * D, a.T - t0 - first);
}

static void attention(const Attention& a, simt::Stream stream) {
    const int bytes = (kQueries + 4 * kKeys) * kPitch * 2;
    simt::launch("pipelined", pipelined, dim3(divided(a.T, kQueries), a.heads), dim3(kThreads), bytes, stream, a);
}

TINYGPT_RUNG(Attention, attention)
