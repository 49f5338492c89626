// AdamW and gradient clipping over all tensors of a model, one launch for each pass over memory.
//
// AdamW (Loshchilov, Hutter 2019, algorithm 2), one pass, with one square root and one division:
//     m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2,    g the gradient times grad_scale
//     p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Clipping takes two: the first leaves a sum of squares for each block; in the second every block adds these up alike,
// in their order, and scales. Where nothing is to be scaled, gradients are not touched again.
//
// Tensors are cut into pieces, and a block finds its own in a table of all of them. The table is the kernel's argument:
// it needs no memory and no copy, so that a CUDA graph captures a step with the addresses of that step. Of 32 KB, which
// a kernel takes since CUDA 12.1, it has room for some 540 tensors (clipping: 1160); for more there are more launches,
// and few get by with 4 KB. Elements are computed alike, in vectors or singly: the cut does not show in the result.

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kPiece = 8 * kThreads;  // elements
constexpr int kBlocks = 1024;         // that clip a table's tensors: each adds up the sums of all

// Tensors that hold anything, and their pieces.
template <class Tensor, int BYTES>
struct Table {
    static constexpr int kBytes = BYTES;
    static constexpr int kRoom = (BYTES - 16) / static_cast<int>(sizeof(Tensor) + sizeof(int));

    int count = 0;
    int end[kRoom];  // the number of pieces up to the end of a tensor
    Tensor tensors[kRoom];

    void add(const Tensor& t) {
        const int before = pieces();
        tensors[count] = t;
        end[count++] = before + static_cast<int>((t.size + kPiece - 1) / kPiece);
    }
    __host__ __device__ int pieces() const { return count ? end[count - 1] : 0; }

    // The tensor that has piece `piece`.
    SIMT_DEVICE int holder(int piece) const {
        int low = 0, high = count - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (piece < end[middle])
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    }
};

constexpr int kFew = 4096 - 64, kMany = simt::kArgumentBytes - 64;  // bytes; the rest is for other arguments

// Calls `body` with one table after the other until all tensors were in one; with an empty table where there are none.
template <class Tensor, class Body>
void for_tables(const Tensor* tensors, int64_t count, const Body& body) {
    const auto fill = [&](auto table) {
        bool called = false;
        for (int64_t i = 0; i < count; ++i) {
            if (tensors[i].size == 0) continue;
            if (table.count == table.kRoom) {
                body(table);
                table.count = 0;
                called = true;
            }
            table.add(tensors[i]);
        }
        if (table.count || !called) body(table);
    };
    if (count <= Table<Tensor, kFew>::kRoom)
        fill(Table<Tensor, kFew>());
    else
        fill(Table<Tensor, kMany>());
}

// Calls `body(number of elements, first element)` for all elements begin..end of a tensor, N at once, and singly what
// is left at the end. `begin` is a multiple of kPiece.
template <int N, class Body>
SIMT_DEVICE void for_vectors(int64_t begin, int64_t end, const Body& body) {
    const int64_t whole = end - (end - begin) % N;
    for (int64_t c = begin + N * threadIdx.x; c < whole; c += N * kThreads) body(std::integral_constant<int, N>(), c);
    for (int64_t c = whole + threadIdx.x; c < end; c += kThreads) body(std::integral_constant<int, 1>(), c);
}

template <class Tensor, int BYTES>
SIMT_DEVICE int64_t begin_of(const Table<Tensor, BYTES>& table, int holder, int piece) {
    return static_cast<int64_t>(piece - (holder ? table.end[holder - 1] : 0)) * kPiece;
}

SIMT_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------- AdamW

struct Coefficients {
    float beta1, rest1, beta2, rest2, root, eps, keep, rate, scale;
};

template <int BYTES>
__global__ void __launch_bounds__(kThreads) adamw(SIMT_ARGUMENT(table, Table<AdamWTensor, BYTES>), Coefficients k) {
    const int piece = blockIdx.x, holder = table.holder(piece);
    const AdamWTensor& t = table.tensors[holder];
    const int64_t begin = begin_of(table, holder, piece), end = least(begin + kPiece, t.size);
    const auto update = [&](auto lanes, int64_t c) {
        constexpr int N = decltype(lanes)::value;
        const Floats<N> g = parameters<N>(t.grad, t.grad_dtype, c);
        Floats<N> p = parameters<N>(t.param, t.param_dtype, c), m = parameters<N>(t.exp_avg, t.moment_dtype, c),
                  v = parameters<N>(t.exp_avg_sq, t.moment_dtype, c);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float gradient = g.at[i] * k.scale;
            m.at[i] = m.at[i] * k.beta1 + gradient * k.rest1;
            v.at[i] = v.at[i] * k.beta2 + gradient * gradient * k.rest2;
            p.at[i] = p.at[i] * k.keep - k.rate * m.at[i] / (sqrtf(v.at[i]) * k.root + k.eps);
        }
        put_parameters<N>(t.exp_avg, t.moment_dtype, c, m);
        put_parameters<N>(t.exp_avg_sq, t.moment_dtype, c, v);
        put_parameters<N>(t.param, t.param_dtype, c, p);
    };
    const bool wide = t.param_dtype == DType::f32 || t.grad_dtype == DType::f32 || t.moment_dtype == DType::f32;
    if (!(aligned(t.param) && aligned(t.grad) && aligned(t.exp_avg) && aligned(t.exp_avg_sq)))
        for_vectors<1>(begin, end, update);
    else if (wide)
        for_vectors<4>(begin, end, update);
    else
        for_vectors<8>(begin, end, update);
}

// ------------------------------------------------------------------------------------------------- clipping

// The sum over the block, in every thread, in the same order each time. Once in a kernel.
SIMT_DEVICE float block_sum(float x) {
    SIMT_SHARED(float, sums, kWarps);
    x = simt::warp_sum(x);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += sums[i];
    return x;
}

// Calls `body(tensor, number of elements, first element)` for all elements of the pieces that fall to this block.
template <int BYTES, class Body>
SIMT_DEVICE void for_share(const Table<GradTensor, BYTES>& table, const Body& body) {
    const int64_t pieces = table.pieces();
    const int last = static_cast<int>(pieces * (blockIdx.x + 1) / gridDim.x);
    int piece = static_cast<int>(pieces * blockIdx.x / gridDim.x), holder = table.holder(piece);
    for (; piece < last; ++piece) {
        if (piece == table.end[holder]) ++holder;
        const GradTensor& t = table.tensors[holder];
        const int64_t begin = begin_of(table, holder, piece), end = least(begin + kPiece, t.size);
        const auto each = [&](auto lanes, int64_t c) { body(t, lanes, c); };
        if (!aligned(t.grad))
            for_vectors<1>(begin, end, each);
        else if (t.dtype == DType::f32)
            for_vectors<4>(begin, end, each);
        else
            for_vectors<8>(begin, end, each);
    }
}

// One float for each block.
template <int BYTES>
__global__ void __launch_bounds__(kThreads) square_sum(SIMT_ARGUMENT(table, Table<GradTensor, BYTES>), float* partial) {
    float total = 0.0f;
    for_share(table, [&](const GradTensor& t, auto lanes, int64_t c) {
        constexpr int N = decltype(lanes)::value;
        const Floats<N> g = parameters<N>(t.grad, t.dtype, c);
#pragma unroll
        for (int i = 0; i < N; ++i) total += g.at[i] * g.at[i];
    });
    total = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <int BYTES>
__global__ void __launch_bounds__(kThreads) scale(SIMT_ARGUMENT(table, Table<GradTensor, BYTES>), const float* partial,
                                                  int parts, float max_norm, float* norm) {
    float total = 0.0f;
    for (int i = threadIdx.x; i < parts; i += kThreads) total += partial[i];
    total = sqrtf(block_sum(total));
    if (blockIdx.x == 0 && threadIdx.x == 0) *norm = total;
    const float factor = max_norm / (total + 1e-6f);
    if (factor >= 1.0f) return;  // false for NaN: a norm that is not finite must show in the gradients
    for_share(table, [&](const GradTensor& t, auto lanes, int64_t c) {
        constexpr int N = decltype(lanes)::value;
        Floats<N> g = parameters<N>(t.grad, t.dtype, c);
#pragma unroll
        for (int i = 0; i < N; ++i) g.at[i] *= factor;
        put_parameters<N>(t.grad, t.dtype, c, g);
    });
}

template <class Table>
unsigned blocks_of(const Table& table) {
    return static_cast<unsigned>(table.pieces() < kBlocks ? table.pieces() : kBlocks);
}

}  // namespace

void adamw_(const AdamW& a, Stream stream) {
    const double correction1 = 1.0 - std::pow(a.beta1, static_cast<double>(a.step));
    const double correction2 = 1.0 - std::pow(a.beta2, static_cast<double>(a.step));
    const Coefficients k{static_cast<float>(a.beta1),
                         static_cast<float>(1.0 - a.beta1),
                         static_cast<float>(a.beta2),
                         static_cast<float>(1.0 - a.beta2),
                         static_cast<float>(1.0 / std::sqrt(correction2)),
                         static_cast<float>(a.eps),
                         static_cast<float>(1.0 - a.lr * a.weight_decay),
                         static_cast<float>(a.lr / correction1),
                         static_cast<float>(a.grad_scale)};
    for_tables(a.tensors, a.count, [&](const auto& table) {
        if (table.count == 0) return;
        simt::launch("adamw", adamw<std::decay_t<decltype(table)>::kBytes>, dim3(static_cast<unsigned>(table.pieces())),
                     dim3(kThreads), 0, static_cast<simt::Stream>(stream), table, k);
    });
}

int64_t clip_grad_norm_workspace(const std::vector<int64_t>& sizes) {
    std::vector<GradTensor> tensors(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) tensors[i].size = sizes[i];
    int64_t parts = 0;
    for_tables(tensors.data(), static_cast<int64_t>(tensors.size()),
               [&](const auto& table) { parts += blocks_of(table); });
    return parts;
}

void clip_grad_norm_(const ClipGradNorm& a, float* workspace, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    int parts = 0;
    for_tables(a.tensors, a.count, [&](const auto& table) {
        if (table.count == 0) return;
        simt::launch("clip_grad_norm, squares", square_sum<std::decay_t<decltype(table)>::kBytes>,
                     dim3(blocks_of(table)), dim3(kThreads), 0, on, table, workspace + parts);
        parts += blocks_of(table);
    });
    for_tables(a.tensors, a.count, [&](const auto& table) {
        simt::launch("clip_grad_norm, scale", scale<std::decay_t<decltype(table)>::kBytes>,
                     dim3(table.count ? blocks_of(table) : 1), dim3(kThreads), 0, on, table,
                     static_cast<const float*>(workspace), parts, static_cast<float>(a.max_norm), a.norm);
    });
}

}  // namespace tinygpt::cuda
