// naive: the equations as they stand, a thread for each number.
//
// Three kernels: every score, every row's softmax, every number of the result. Scores go to memory and come back, three
// times. A thread that makes a score reads a whole query and a whole key for it, two bytes at a time, though its
// neighbours read the same query; and since neighbours have different keys, 128 bytes apart, one request of a warp
// touches 32 sectors of 32 bytes to get 2 of each.

#include "ladder.h"

using namespace ladder;

__global__ void score(Attention a) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, head = blockIdx.z;
    if (s > t) return;  // not seen
    const bfloat* q = a.q + (int64_t{head} * a.T + t) * D;
    const bfloat* k = a.k + (int64_t{head} * a.T + s) * D;
    float sum = 0.0f;
    for (int d = 0; d < D; ++d) sum += simt::to_float(q[d]) * simt::to_float(k[d]);
    a.scores[(int64_t{head} * a.T + t) * a.T + s] = sum * kScale;
}

__global__ void softmax(Attention a) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.heads * a.T) return;
    float* p = a.scores + int64_t{row} * a.T;
    const int seen = row % a.T + 1;
    float top = p[0], total = 0.0f;
    for (int s = 1; s < seen; ++s) top = fmaxf(top, p[s]);
    for (int s = 0; s < seen; ++s) total += expf(p[s] - top);
    for (int s = 0; s < seen; ++s) p[s] = expf(p[s] - top) / total;
}

__global__ void value(Attention a) {
    const int d = threadIdx.x, t = blockIdx.x, head = blockIdx.y;
    const float* p = a.scores + (int64_t{head} * a.T + t) * a.T;
    const bfloat* v = a.v + int64_t{head} * a.T * D;
    float sum = 0.0f;
    for (int s = 0; s <= t; ++s) sum += p[s] * simt::to_float(v[s * D + d]);
    a.y[(int64_t{head} * a.T + t) * D + d] = simt::from_float<bfloat>(sum);
}

static void attention(const Attention& a, simt::Stream stream) {
    const unsigned heads = a.heads, T = a.T;
    simt::launch("score", score, dim3(divided(a.T, 64), T, heads), dim3(64), 0, stream, a);
    simt::launch("softmax", softmax, dim3(divided(a.heads * a.T, 64)), dim3(64), 0, stream, a);
    simt::launch("value", value, dim3(T, heads), dim3(D), 0, stream, a);
}

TINYGPT_RUNG(Attention, attention)
