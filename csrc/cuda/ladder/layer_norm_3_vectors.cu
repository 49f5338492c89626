// vectors: 16 bytes at a time, and every row read once.
//
// A lane moves 8 neighbouring numbers in one instruction: an eighth of the requests, each of them 512 bytes. The first
// 1024 numbers of a row stay in registers for all three passes, so that they are read once and not three times; longer
// rows read the rest again.
//
// Lower: requests, asked, moved, waited

#include "ladder.h"

using namespace ladder;

constexpr int kWarps = 4, kHeld = 4, kStep = 32 * 8;

struct Eight {
    float at[8];
};

SIMT_DEVICE Eight eight(const bfloat* from) {
    const auto v = simt::load<bfloat, 8>(from);
    Eight f;
    for (int i = 0; i < 8; ++i) f.at[i] = simt::to_float(v.at[i]);
    return f;
}

__global__ void vectors(LayerNorm a) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    const bfloat* x = a.x + int64_t{row} * a.cols;
    bfloat* y = a.y + int64_t{row} * a.cols;

    Eight held[kHeld] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
        if (k * kStep + lane * 8 < a.cols) held[k] = eight(x + k * kStep + lane * 8);
    // Calls `with` for every vector of the row that is this lane's, with its first column.
    const auto each = [&](auto with) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (k * kStep + lane * 8 < a.cols) with(k * kStep + lane * 8, held[k]);
        for (int c = kHeld * kStep + lane * 8; c < a.cols; c += kStep) with(c, eight(x + c));
    };

    float sum = 0.0f, squares = 0.0f;
    each([&](int, const Eight& v) {
        for (int i = 0; i < 8; ++i) sum += v.at[i];
    });
    const float mean = simt::warp_sum(sum) / a.cols;
    each([&](int, const Eight& v) {
        for (int i = 0; i < 8; ++i) squares += (v.at[i] - mean) * (v.at[i] - mean);
    });
    const float rstd = rsqrtf(simt::warp_sum(squares) / a.cols + a.eps);
    each([&](int c, const Eight& v) {
        const Eight weight = eight(a.weight + c), bias = eight(a.bias + c);
        simt::Vector<bfloat, 8> out;
        for (int i = 0; i < 8; ++i)
            out.at[i] = simt::from_float<bfloat>((v.at[i] - mean) * rstd * weight.at[i] + bias.at[i]);
        simt::store<bfloat, 8>(y + c, out);
    });
}

static void layer_norm(const LayerNorm& a, simt::Stream stream) {
    simt::launch("vectors", vectors, dim3(divided(a.rows, kWarps)), dim3(32 * kWarps), 0, stream, a);
}

TINYGPT_RUNG(LayerNorm, layer_norm)
