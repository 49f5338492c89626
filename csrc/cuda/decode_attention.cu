// Attention of one new token per row against its own length of cache.
//
// One query against a long cache is a walk through memory, and a block for each head would leave most of a GPU idle. So
// a row's keys are shared evenly among `splits` blocks, which write their largest score, their sum of weights and their
// sum of weighted values, and a second kernel combines them (Dao et al. 2023, "Flash-Decoding"). The number of splits
// depends on the sizes of the call alone; how long each share is, on the row's length, read on the GPU. Where the batch
// fills the GPU by itself there is one split and no second kernel.
//
// Lanes share a row of the cache, 16 bytes each, as many as a row of 32, 64 or 128 elements needs. Each group of lanes,
// a slot, keeps sums of its own over every so many keys, until the share is done: no barrier before. Of grouped heads a
// block takes up to four, with the same keys and values; further ones, in other blocks, find these in the second-level
// cache. Tensor cores would find too few queries to do.
//
// Rows that do not begin at multiples of 16 bytes are read element by element, by the same lanes. float32: scores in
// powers of e, as in the forward of attention.

#include <algorithm>

#include "attention.cuh"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kSteps = 4;         // rows that a slot reads before it works on them
constexpr int kGroup = 4;         // heads of a block
constexpr int kBlocks = 264;      // wanted: two for each multiprocessor of an H100
constexpr int kMostSplits = 128;  // so that combining does not take longer than it saves
constexpr float kInfinity = INFINITY;

template <class T>
constexpr float kUnit = std::is_same<T, float>::value ? 1.0f : kLog2E;  // scores are in powers of e, or of two

template <class T>
SIMT_DEVICE float power(float x) {
    if constexpr (std::is_same<T, float>::value)
        return expf(x);
    else
        return simt::exp2_fast(x);
}

// What scores are relative to: the largest of them, or anything where there is none.
SIMT_DEVICE float base_of(float top) { return top == -kInfinity ? 0.0f : top; }

// How the keys of a row fall to the splits: `span` to each, none to those from `used` on.
struct Share {
    int length, span, used;

    SIMT_DEVICE Share(const Attention& a, int b, int splits, int slots) : length(Sight(a, b).valid) {
        span = (length + splits * slots - 1) / (splits * slots) * slots;
        used = length == 0 ? 0 : (length + span - 1) / span;
    }
};

// N elements of a row from element d on; zeros past its end.
template <class T, int N, bool VECTORS>
SIMT_DEVICE simt::Vector<T, N> part(const T* row, int d, int D) {
    if constexpr (VECTORS) {
        if (d < D) return simt::load<T, N>(row + d);
    }
    simt::Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.at[i] = !VECTORS && d + i < D ? row[d + i] : simt::from_float<T>(0.0f);
    return v;
}

// Sums of one slot, for one head: weights are relative to `top`.
template <int N>
struct Sums {
    float top = -kInfinity, weight = 0.0f;
    Floats<N> value = {};

    // Makes `top` the largest of it and `other`.
    template <class T>
    SIMT_DEVICE void raise(float other) {
        const float higher = fmaxf(top, other), shrink = power<T>(top - base_of(higher));
        top = higher;
        weight *= shrink;
#pragma unroll
        for (int i = 0; i < N; ++i) value.at[i] *= shrink;
    }
};

// A block: blockIdx.x a row of the batch, a key/value head and GROUP query heads of it, blockIdx.y a split.
template <class T, int ROW, int GROUP, bool VECTORS>
__global__ void __launch_bounds__(kThreads, 3) split(Attention a, T* y, float* partial) {
    constexpr int N = kLanes<T, true>, LANES = ROW / N, kSlots = kThreads / LANES;
    const int D = static_cast<int>(a.D), H = static_cast<int>(a.H), K = static_cast<int>(a.K);
    const int each = H / K, groups = (each + GROUP - 1) / GROUP, splits = gridDim.y;
    const int b = blockIdx.x / (K * groups), kv = blockIdx.x / groups % K, first = blockIdx.x % groups * GROUP;
    const int heads = least(GROUP, each - first), head = kv * each + first;
    const int slot = threadIdx.x / LANES, d = threadIdx.x % LANES * N;
    const Share share(a, b, splits, kSlots);
    const int begin = blockIdx.y * share.span, end = least(begin + share.span, share.length);
    if (begin >= end && splits > 1) return;  // and the second kernel knows

    Floats<N> q[GROUP];
    Sums<N> sums[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        q[g] = floats<N>(part<T, N, VECTORS>(at<T>(a.q, b, 0, head + least(g, heads - 1)), d, D));
#pragma unroll
        for (int i = 0; i < N; ++i) q[g].at[i] *= a.scale * kUnit<T>;
    }
    for (int s = begin; s < end; s += kSlots * kSteps) {
        simt::Vector<T, N> k[kSteps], v[kSteps];
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
            const int key = s + u * kSlots + slot, seen = key < end ? D : 0;
            k[u] = part<T, N, VECTORS>(at<T>(a.k, b, key, kv), d, seen);
            v[u] = part<T, N, VECTORS>(at<T>(a.v, b, key, kv), d, seen);
        }
        float score[GROUP][kSteps] = {};
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
            const Floats<N> row = floats<N>(k[u]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
#pragma unroll
                for (int i = 0; i < N; ++i) score[g][u] += q[g].at[i] * row.at[i];
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2)
                    score[g][u] += __shfl_xor_sync(simt::kWholeWarp, score[g][u], step);
                if (s + u * kSlots + slot >= end) score[g][u] = -kInfinity;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float top = score[g][0];
#pragma unroll
            for (int u = 1; u < kSteps; ++u) top = fmaxf(top, score[g][u]);
            sums[g].template raise<T>(top);
        }
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
            const Floats<N> row = floats<N>(v[u]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                const float weight = power<T>(score[g][u] - base_of(sums[g].top));
                sums[g].weight += weight;
#pragma unroll
                for (int i = 0; i < N; ++i) sums[g].value.at[i] += weight * row.at[i];
            }
        }
    }

    // The slots of a warp, then the warps. A word more for every 32 columns: the lanes' columns lie N apart.
    constexpr int kRow = ROW + ROW / 32;
    SIMT_SHARED(float, values, kWarps * GROUP * kRow);
    SIMT_SHARED(float, tops, kWarps* GROUP);
    SIMT_SHARED(float, weights, kWarps* GROUP);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        Sums<N>& mine = sums[g];
        float top = mine.top;
#pragma unroll
        for (int step = LANES; step < kWarp; step *= 2) top = fmaxf(top, __shfl_xor_sync(simt::kWholeWarp, top, step));
        mine.template raise<T>(top);
#pragma unroll
        for (int step = LANES; step < kWarp; step *= 2) {
            mine.weight += __shfl_xor_sync(simt::kWholeWarp, mine.weight, step);
#pragma unroll
            for (int i = 0; i < N; ++i) mine.value.at[i] += __shfl_xor_sync(simt::kWholeWarp, mine.value.at[i], step);
        }
        if (lane == 0) {
            tops[warp * GROUP + g] = mine.top;
            weights[warp * GROUP + g] = mine.weight;
        }
        if (lane < LANES) {
#pragma unroll
            for (int i = 0; i < N; ++i) values[(warp * GROUP + g) * kRow + d + i + (d + i) / 32] = mine.value.at[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * ROW; i += kThreads) {
        const int g = i / ROW, column = i % ROW;
        Sums<1> all;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) all.top = fmaxf(all.top, tops[w * GROUP + g]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float factor = power<T>(tops[w * GROUP + g] - base_of(all.top));
            all.weight += factor * weights[w * GROUP + g];
            all.value.at[0] += factor * values[(w * GROUP + g) * kRow + column + column / 32];
        }
        const int64_t row = static_cast<int64_t>(b) * H + head + g, place = row * splits + blockIdx.y;
        if (splits == 1) {
            if (column < D)
                y[row * D + column] = simt::from_float<T>(share.length ? all.value.at[0] / all.weight : 0.0f);
            continue;
        }
        if (column < D) partial[place * D + column] = all.value.at[0];
        if (column == 0) {
            float* rest = partial + static_cast<int64_t>(a.B) * H * splits * D + 2 * place;
            rest[0] = all.top;
            rest[1] = all.weight;
        }
    }
}

// A block: one head of one row. A thread: one column.
template <class T>
__global__ void __launch_bounds__(kThreads) combine(Attention a, T* y, const float* partial, int splits, int slots) {
    const int D = static_cast<int>(a.D), d = threadIdx.x;
    const int64_t row = blockIdx.x;
    const int used = Share(a, static_cast<int>(row / a.H), splits, slots).used;
    const float* rest = partial + a.B * a.H * splits * D + 2 * row * splits;
    if (d >= D) return;
    float top = -kInfinity, weight = 0.0f, value = 0.0f;
    for (int i = 0; i < used; ++i) top = fmaxf(top, rest[2 * i]);
    for (int i = 0; i < used; ++i) {
        const float factor = power<T>(rest[2 * i] - top);
        weight += factor * rest[2 * i + 1];
        value += factor * partial[(row * splits + i) * D + d];
    }
    y[row * D + d] = simt::from_float<T>(used ? value / weight : 0.0f);
}

// Calls `with(ROW)` for the smallest ROW that holds D elements, as a constant.
template <class With>
void for_row(int64_t D, const With& with) {
    if (D <= 32) return with(std::integral_constant<int, 32>());
    if (D <= 64) return with(std::integral_constant<int, 64>());
    if (D <= 128) return with(std::integral_constant<int, 128>());
    throw std::invalid_argument("decode_attention on cuda: head_dim " + std::to_string(D) + " is above 128");
}

template <class T>
bool in_vectors(const Heads& x) {
    constexpr int N = kLanes<T, true>;
    return aligned(x.data) && x.batch % N == 0 && x.token % N == 0 && x.head % N == 0;
}

template <class T>
void launch(const Attention& a, T* y, float* partial, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const int64_t each = a.H / a.K;
    const bool vectors = a.D % N == 0 && in_vectors<T>(a.q) && in_vectors<T>(a.k) && in_vectors<T>(a.v);
    const bool grouped = vectors && each > 1;
    const int splits = static_cast<int>(decode_attention_splits(a.B, a.S, a.H, a.K, a.D, a.dtype));
    const dim3 grid(static_cast<unsigned>(a.B * a.K * (grouped ? (each + kGroup - 1) / kGroup : each)),
                    static_cast<unsigned>(splits));
    for_row(a.D, [&](auto row) {
        constexpr int ROW = decltype(row)::value;
        simt::launch("decode_attention",
                     grouped   ? split<T, ROW, kGroup, true>
                     : vectors ? split<T, ROW, 1, true>
                               : split<T, ROW, 1, false>,
                     grid, dim3(kThreads), 0, stream, a, y, partial);
        if (splits > 1)
            simt::launch("decode_attention, combine", combine<T>, dim3(static_cast<unsigned>(a.B * a.H)),
                         dim3(kThreads), 0, stream, a, y, static_cast<const float*>(partial), splits,
                         kThreads * N / ROW);
    });
}

}  // namespace

int64_t decode_attention_splits(int64_t B, int64_t S, int64_t H, int64_t K, int64_t D, DType dtype) {
    const int64_t each = H / K, blocks = B * K * (each > 1 ? (each + kGroup - 1) / kGroup : 1);
    int64_t splits = 1;
    for_row(D, [&](auto row) {
        const int64_t keys = kSteps * kThreads * (dtype == DType::f32 ? 4 : 8) / row;  // at once
        splits = blocks ? std::min({(kBlocks + blocks - 1) / blocks, (S + keys - 1) / keys, int64_t{kMostSplits}}) : 1;
    });
    return std::max(splits, int64_t{1});
}

void decode_attention_fwd(const Attention& a, void* y, float* workspace, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.B * a.H == 0) return;
    if (a.dtype == DType::f32) launch(a, static_cast<float*>(y), workspace, on);
    if (a.dtype == DType::f16) launch(a, static_cast<simt::half*>(y), workspace, on);
    if (a.dtype == DType::bf16) launch(a, static_cast<simt::bfloat*>(y), workspace, on);
}

}  // namespace tinygpt::cuda
