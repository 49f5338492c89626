// The work of one warp on tensor cores, which the last two rungs share: 16 queries, against tiles of 64 keys.
//
// A product of fragments is m16n8k16: 16 x 16 times 16 x 8, spread over the registers of a warp. ldmatrix brings
// fragments from shared memory, eight rows of 16 bytes at a time; rows are 16 bytes longer than their numbers, so that
// those eight lie in different banks. The scores of a product are, rounded, the left operand of the next: they never
// leave the registers.
#pragma once

#include "ladder.h"

namespace ladder {

constexpr int kWarps = 4, kQueries = 16 * kWarps, kKeys = 64, kThreads = 32 * kWarps;
constexpr int kPitch = D + 8;

class Warp {
  public:
    // Its queries: 16 rows of a tile.
    SIMT_DEVICE explicit Warp(const bfloat* q) {
        for (int d = 0; d < D / 16; ++d) simt::ldmatrix(q_[d], q + lane() % 16 * kPitch + 16 * d + lane() / 16 * 8);
        for (int r = 0; r < 2; ++r) top_[r] = -INFINITY;
    }

    // A tile of keys and their values; `ahead`: how far its first key is ahead of the warp's first query.
    SIMT_DEVICE void meet(const bfloat* k, const bfloat* v, int ahead) {
        float p[kKeys / 8][4] = {};
        for (int n = 0; n < kKeys / 8; n += 2)
            for (int d = 0; d < D / 16; ++d) {
                uint32_t keys[4];  // keys 8 n to 8 n + 16 of columns 16 d to 16 d + 16
                simt::ldmatrix(keys, k + (8 * n + lane() / 16 * 8 + lane() % 8) * kPitch + 16 * d + lane() / 8 % 2 * 8);
                simt::mma<bfloat>(p[n], q_[d], {keys[0], keys[1]});
                simt::mma<bfloat>(p[n + 1], q_[d], {keys[2], keys[3]});
            }
        // A lane has two rows, lane / 4 and that plus 8, and of each 8 keys two; four lanes share a row.
        for (int r = 0; r < 2; ++r) {
            const int row = lane() / 4 + 8 * r;
            float highest = -INFINITY;
            for (int n = 0; n < kKeys / 8; ++n)
                for (int i = 0; i < 2; ++i) {
                    float& score = p[n][2 * r + i];
                    score = ahead + 8 * n + lane() % 4 * 2 + i <= row ? score * kScale : -INFINITY;
                    highest = fmaxf(highest, score);
                }
            highest = fmaxf(highest, __shfl_xor_sync(simt::kWholeWarp, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(simt::kWholeWarp, highest, 2));
            const float before = top_[r];
            top_[r] = fmaxf(before, highest);
            const float shrink = expf(before - top_[r]);
            total_[r] *= shrink;
            for (int d = 0; d < D / 8; ++d)
                for (int i = 0; i < 2; ++i) result_[d][2 * r + i] *= shrink;
            for (int n = 0; n < kKeys / 8; ++n)
                for (int i = 0; i < 2; ++i) total_[r] += p[n][2 * r + i] = expf(p[n][2 * r + i] - top_[r]);
        }
        for (int s = 0; s < kKeys / 16; ++s) {
            const uint32_t weights[4] = {simt::pack2<bfloat>(p[2 * s][0], p[2 * s][1]),
                                         simt::pack2<bfloat>(p[2 * s][2], p[2 * s][3]),
                                         simt::pack2<bfloat>(p[2 * s + 1][0], p[2 * s + 1][1]),
                                         simt::pack2<bfloat>(p[2 * s + 1][2], p[2 * s + 1][3])};
            for (int d = 0; d < D / 8; d += 2) {
                uint32_t values[4];  // keys 16 s to 16 s + 16 of columns 8 d to 8 d + 16
                simt::ldmatrix_transposed(values, v + (16 * s + lane() % 16) * kPitch + 8 * d + lane() / 16 * 8);
                simt::mma<bfloat>(result_[d], weights, {values[0], values[1]});
                simt::mma<bfloat>(result_[d + 1], weights, {values[2], values[3]});
            }
        }
    }

    // Its rows of y, of which `rows` exist.
    SIMT_DEVICE void put(bfloat* y, int rows) const {
        for (int r = 0; r < 2; ++r) {
            float total = total_[r];
            total += __shfl_xor_sync(simt::kWholeWarp, total, 1);
            total += __shfl_xor_sync(simt::kWholeWarp, total, 2);
            const int row = lane() / 4 + 8 * r;
            if (row >= rows) continue;
            for (int d = 0; d < D / 8; ++d) {
                const simt::Vector<bfloat, 2> pair{{simt::from_float<bfloat>(result_[d][2 * r] / total),
                                                    simt::from_float<bfloat>(result_[d][2 * r + 1] / total)}};
                simt::store<bfloat, 2>(y + row * D + 8 * d + lane() % 4 * 2, pair);
            }
        }
    }

  private:
    SIMT_DEVICE static int lane() { return threadIdx.x % 32; }

    uint32_t q_[D / 16][4];
    float result_[D / 8][4] = {}, top_[2], total_[2] = {};
};

}  // namespace ladder
