// naive: a thread for each row.
//
// It walks along its row three times: for the mean, for the variance around it, for the result. Neighbouring threads
// have neighbouring rows, so what a warp asks for at once lies a whole row apart: 32 sectors of 32 bytes are moved
// for 2 bytes of each.

#include "ladder.h"

using namespace ladder;

__global__ void naive(LayerNorm a) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const bfloat* x = a.x + int64_t{row} * a.cols;
    bfloat* y = a.y + int64_t{row} * a.cols;
    float mean = 0.0f, variance = 0.0f;
    for (int c = 0; c < a.cols; ++c) mean += simt::to_float(x[c]);
    mean /= a.cols;
    for (int c = 0; c < a.cols; ++c) variance += (simt::to_float(x[c]) - mean) * (simt::to_float(x[c]) - mean);
    const float rstd = rsqrtf(variance / a.cols + a.eps);
    for (int c = 0; c < a.cols; ++c)
        y[c] = simt::from_float<bfloat>((simt::to_float(x[c]) - mean) * rstd * simt::to_float(a.weight[c]) +
                                        simt::to_float(a.bias[c]));
}

static void layer_norm(const LayerNorm& a, simt::Stream stream) {
    simt::launch("naive", naive, dim3(divided(a.rows, 64)), dim3(64), 0, stream, a);
}

TINYGPT_RUNG(LayerNorm, layer_norm)
