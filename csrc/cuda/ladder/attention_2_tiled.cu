// tiled: what many threads need is fetched once, into shared memory.
//
// The same three kernels, but a block makes a tile of 32 x 32 scores, and 32 rows of the result: it fetches 32 queries
// and 32 keys, neighbours fetching neighbours, and every one of them is then used 32 times. Rows in shared memory are
// one word longer than their numbers: without it the 32 keys that a warp reads at once would all lie in the same bank.
// A softmax row belongs to a warp, whose lanes read what lies together.
//
// Lower: requests, asked, moved, waited

#include "ladder.h"

using namespace ladder;

constexpr int kTile = 32, kDown = 8, kEach = kTile / kDown;  // 32 x 8 threads, 4 rows each
constexpr int kPitch = D + 2;

// 32 rows of D numbers; zeros beyond the last.
SIMT_DEVICE void fetch(bfloat* tile, const bfloat* from, int count) {
    for (int i = threadIdx.y * kTile + threadIdx.x; i < kTile * D; i += kTile * kDown)
        tile[i / D * kPitch + i % D] = i / D < count ? from[i] : simt::from_float<bfloat>(0.0f);
}

__global__ void score(Attention a) {
    SIMT_SHARED(bfloat, q, kTile * kPitch);
    SIMT_SHARED(bfloat, k, kTile * kPitch);
    const int s0 = blockIdx.x * kTile, t0 = blockIdx.y * kTile, head = blockIdx.z, x = threadIdx.x;
    if (s0 > t0) return;  // a tile that nobody sees
    fetch(q, a.q + (int64_t{head} * a.T + t0) * D, a.T - t0);
    fetch(k, a.k + (int64_t{head} * a.T + s0) * D, a.T - s0);
    __syncthreads();
    float sum[kEach] = {};
    for (int d = 0; d < D; ++d) {
        const float key = simt::to_float(k[x * kPitch + d]);
        for (int i = 0; i < kEach; ++i) sum[i] += simt::to_float(q[(threadIdx.y + kDown * i) * kPitch + d]) * key;
    }
    for (int i = 0; i < kEach; ++i) {
        const int t = t0 + threadIdx.y + kDown * i, s = s0 + x;
        if (t < a.T && s <= t) a.scores[(int64_t{head} * a.T + t) * a.T + s] = sum[i] * kScale;
    }
}

__global__ void softmax(Attention a) {
    const int row = blockIdx.x, lane = threadIdx.x, seen = row % a.T + 1;
    float* p = a.scores + int64_t{row} * a.T;
    float top = -INFINITY, total = 0.0f;
    for (int s = lane; s < seen; s += 32) top = fmaxf(top, p[s]);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(simt::kWholeWarp, top, step));
    for (int s = lane; s < seen; s += 32) total += expf(p[s] - top);
    total = simt::warp_sum(total);
    for (int s = lane; s < seen; s += 32) p[s] = expf(p[s] - top) / total;
}

__global__ void value(Attention a) {
    SIMT_SHARED(float, p, kTile* kTile);
    SIMT_SHARED(bfloat, v, kTile * kPitch);
    const int t0 = blockIdx.x * kTile, head = blockIdx.y, x = threadIdx.x;
    float sum[kEach][2] = {};
    for (int s0 = 0; s0 <= t0; s0 += kTile) {
        __syncthreads();  // the tile before is done with
        fetch(v, a.v + (int64_t{head} * a.T + s0) * D, a.T - s0);
        for (int y = threadIdx.y; y < kTile; y += kDown) {
            const int t = t0 + y, s = s0 + x;
            p[y * kTile + x] = t < a.T && s <= t ? a.scores[(int64_t{head} * a.T + t) * a.T + s] : 0.0f;
        }
        __syncthreads();
        for (int s = 0; s < kTile; ++s)
            for (int i = 0; i < kEach; ++i) {
                const float weight = p[(threadIdx.y + kDown * i) * kTile + s];
                for (int half = 0; half < 2; ++half)
                    sum[i][half] += weight * simt::to_float(v[s * kPitch + x + kTile * half]);
            }
    }
    for (int i = 0; i < kEach; ++i) {
        const int t = t0 + threadIdx.y + kDown * i;
        if (t >= a.T) continue;
        for (int half = 0; half < 2; ++half)
            a.y[(int64_t{head} * a.T + t) * D + x + kTile * half] = simt::from_float<bfloat>(sum[i][half]);
    }
}

static void attention(const Attention& a, simt::Stream stream) {
    const unsigned tiles = divided(a.T, kTile), heads = a.heads;
    const dim3 block(kTile, kDown);
    simt::launch("score", score, dim3(tiles, tiles, heads), block, 0, stream, a);
    simt::launch("softmax", softmax, dim3(heads * a.T), dim3(32), 0, stream, a);
    simt::launch("value", value, dim3(tiles, heads), block, 0, stream, a);
}

TINYGPT_RUNG(Attention, attention)
