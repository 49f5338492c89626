// online: one kernel, and scores never reach memory.
//
// A block keeps 32 queries and walks over the keys, 32 at a time. Of each row it knows the largest score so far and the
// sum of exponentials relative to it; when a tile brings a larger one, both that sum and the result so far shrink by
// exp(old - new) (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). What remains of global traffic is
// q, k, v and y: T x D numbers, not T x T.
//
// Lower: requests, asked, moved, waited

#include "ladder.h"

using namespace ladder;

constexpr int kTile = 32, kDown = 8, kEach = kTile / kDown;  // 8 warps, 4 queries each; a lane is a key, then a column
constexpr int kPitch = D + 2;

SIMT_DEVICE void fetch(bfloat* tile, const bfloat* from, int count) {
    for (int i = threadIdx.y * kTile + threadIdx.x; i < kTile * D; i += kTile * kDown)
        tile[i / D * kPitch + i % D] = i / D < count ? from[i] : simt::from_float<bfloat>(0.0f);
}

__global__ void online(Attention a) {
    SIMT_SHARED(bfloat, q, kTile * kPitch);
    SIMT_SHARED(bfloat, k, kTile * kPitch);
    SIMT_SHARED(bfloat, v, kTile * kPitch);
    SIMT_SHARED(float, p, kTile* kTile);
    const int t0 = blockIdx.x * kTile, head = blockIdx.y, x = threadIdx.x;
    fetch(q, a.q + (int64_t{head} * a.T + t0) * D, a.T - t0);
    float result[kEach][2] = {}, top[kEach], total[kEach] = {};
    for (int i = 0; i < kEach; ++i) top[i] = -INFINITY;

    for (int s0 = 0; s0 <= t0; s0 += kTile) {
        __syncthreads();  // the tile before is done with
        fetch(k, a.k + (int64_t{head} * a.T + s0) * D, a.T - s0);
        fetch(v, a.v + (int64_t{head} * a.T + s0) * D, a.T - s0);
        __syncthreads();
        float score[kEach] = {};
        for (int d = 0; d < D; ++d) {
            const float key = simt::to_float(k[x * kPitch + d]);
            for (int i = 0; i < kEach; ++i) score[i] += simt::to_float(q[(threadIdx.y + kDown * i) * kPitch + d]) * key;
        }
        for (int i = 0; i < kEach; ++i) {
            const int y = threadIdx.y + kDown * i;
            score[i] = s0 + x <= t0 + y ? score[i] * kScale : -INFINITY;
            float highest = score[i];
            for (int step = 16; step > 0; step /= 2)
                highest = fmaxf(highest, __shfl_xor_sync(simt::kWholeWarp, highest, step));
            const float before = top[i];
            top[i] = fmaxf(top[i], highest);
            const float weight = expf(score[i] - top[i]), shrink = expf(before - top[i]);
            total[i] = total[i] * shrink + simt::warp_sum(weight);
            result[i][0] *= shrink;
            result[i][1] *= shrink;
            p[y * kTile + x] = weight;
        }
        __syncwarp();  // a row of weights is its warp's own
        for (int s = 0; s < kTile; ++s)
            for (int i = 0; i < kEach; ++i) {
                const float weight = p[(threadIdx.y + kDown * i) * kTile + s];
                for (int half = 0; half < 2; ++half)
                    result[i][half] += weight * simt::to_float(v[s * kPitch + x + kTile * half]);
            }
    }
    for (int i = 0; i < kEach; ++i) {
        const int t = t0 + threadIdx.y + kDown * i;
        if (t >= a.T) continue;
        for (int half = 0; half < 2; ++half)
            a.y[(int64_t{head} * a.T + t) * D + x + kTile * half] =
                simt::from_float<bfloat>(result[i][half] / total[i]);
    }
}

static void attention(const Attention& a, simt::Stream stream) {
    simt::launch("online", online, dim3(divided(a.T, kTile), a.heads), dim3(kTile, kDown), 0, stream, a);
}

TINYGPT_RUNG(Attention, attention)
