// one warp a row: neighbours read neighbours.
//
// A lane takes every 32nd number of a row, so that a request of a warp is 64 bytes that lie together: two sectors, all
// of them used. Sums over the row go through registers: five shuffles bring 32 lanes' sums together.
//
// Lower: moved

#include "ladder.h"

using namespace ladder;

constexpr int kWarps = 4;

__global__ void one_warp(LayerNorm a) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    const bfloat* x = a.x + int64_t{row} * a.cols;
    bfloat* y = a.y + int64_t{row} * a.cols;
    float sum = 0.0f, squares = 0.0f;
    for (int c = lane; c < a.cols; c += 32) sum += simt::to_float(x[c]);
    const float mean = simt::warp_sum(sum) / a.cols;
    for (int c = lane; c < a.cols; c += 32) {
        const float difference = simt::to_float(x[c]) - mean;
        squares += difference * difference;
    }
    const float rstd = rsqrtf(simt::warp_sum(squares) / a.cols + a.eps);
    for (int c = lane; c < a.cols; c += 32)
        y[c] = simt::from_float<bfloat>((simt::to_float(x[c]) - mean) * rstd * simt::to_float(a.weight[c]) +
                                        simt::to_float(a.bias[c]));
}

static void layer_norm(const LayerNorm& a, simt::Stream stream) {
    simt::launch("one warp", one_warp, dim3(divided(a.rows, kWarps)), dim3(32 * kWarps), 0, stream, a);
}

TINYGPT_RUNG(LayerNorm, layer_norm)
