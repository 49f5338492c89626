// Bias add and GELU in one pass, forward and backward, for one instruction set (Hendrycks, Gimpel 2016).
//
// Forward: y = gelu(z), z = x + bias. Backward: dx = dy gelu'(z) from the x that came in, so nothing is saved; dbias is
// the sum of dx over the rows, before dx is rounded. Both are one reading and one writing of memory; gelu.h says how
// the two functions are computed.
//
// Without a bias, contiguous tensors are one long row, cut into pieces. With dbias, rows go in fixed chunks, each with
// its own sums, added up at the end in the order of the chunks: the result does not depend on the number of threads.
//
// What lies a page ahead is asked for: the processor's own prefetching stops at the end of a page, and there is too
// much arithmetic per element for it to catch up (5 to 15 % at 2048 x 512 and more; stores past the cache gained
// nothing).
//
// Left out: storing gelu'(z) in the forward. It saves arithmetic that hides behind the memory anyway; a matrix product
// whose epilogue has z at hand may do it.

#include "gelu.h"

#include "kernels.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // elements of a long row that go together: shared evenly, and no loop is short

inline void ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 4096); }

// The shape the work is done in: that of the tensors, or pieces of one long row, the last of which may be shorter.
struct Shape {
    int64_t rows, cols, last;  // the last row has `last` columns
};

Shape shape_of(int64_t rows, int64_t cols, bool one_row) {
    const int64_t n = rows * cols;
    if (!one_row || n <= kPiece) return {rows, cols, cols};
    const int64_t pieces = (n + kPiece - 1) / kPiece;
    return {pieces, kPiece, n - (pieces - 1) * kPiece};
}

template <bool TANH, class T>
void forward(const GeluFwd& a, const float* bias) {
    const bool one_row = bias == nullptr && a.x_stride == a.cols;
    const Shape shape = shape_of(a.rows, a.cols, one_row);
    const int64_t x_stride = one_row ? shape.cols : a.x_stride;
    [[maybe_unused]] const int threads = cpu::thread_count(shape.rows, 8 * a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < shape.rows; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * x_stride;
        T* y = static_cast<T*>(a.y) + row * shape.cols;
        const int64_t n = row + 1 == shape.rows ? shape.last : shape.cols;
        const auto near = [&](int64_t c) { ahead(x + c), ahead(y + c); };
        if (bias)
            for_lines<T>(n, near, [&](auto get, auto put, int64_t c, int) {
                put(y + c, gelu<TANH>(get(x + c) + get(bias + c)));
            });
        else
            for_lines<T>(n, near, [&](auto get, auto put, int64_t c, int) { put(y + c, gelu<TANH>(get(x + c))); });
    }
}

template <class T>
void forward(const GeluFwd& a, const float* bias) {
    a.tanh ? forward<true, T>(a, bias) : forward<false, T>(a, bias);
}

}  // namespace

bool gelu_fwd(const GeluFwd& a) {
    float* buffer = cpu::workspace(a.cols);
    if (buffer == nullptr) return false;
    const float* bias = as_floats(buffer, a.bias, a.bias_dtype, a.cols);
    if (a.dtype == DType::f32) forward<float>(a, bias);
    if (a.dtype == DType::f16) forward<half>(a, bias);
    if (a.dtype == DType::bf16) forward<bfloat>(a, bias);
    return true;
}

namespace {

template <bool TANH, class T>
void backward(const GeluBwd& a, const float* bias, float* sums, int64_t chunks) {
    const bool one_row = bias == nullptr && sums == nullptr && a.x_stride == a.cols && a.dy_stride == a.cols;
    const Shape shape = shape_of(a.rows, a.cols, one_row);
    const int64_t x_stride = one_row ? shape.cols : a.x_stride, dy_stride = one_row ? shape.cols : a.dy_stride;
    if (sums == nullptr) chunks = shape.rows;
    const int64_t per_chunk = chunks ? (shape.rows + chunks - 1) / chunks : 0;
    [[maybe_unused]] const int threads = cpu::thread_count(chunks, 8 * a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < chunks; ++k) {
        const int64_t end = (k + 1) * per_chunk < shape.rows ? (k + 1) * per_chunk : shape.rows;
        float* own = sums ? sums + k * a.cols : nullptr;
        if (own) std::memset(own, 0, a.cols * sizeof(float));
        for (int64_t row = k * per_chunk; row < end; ++row) {
            const T* x = static_cast<const T*>(a.x) + row * x_stride;
            const T* dy = static_cast<const T*>(a.dy) + row * dy_stride;
            T* dx = a.dx ? static_cast<T*>(a.dx) + row * shape.cols : nullptr;
            const int64_t n = row + 1 == shape.rows ? shape.last : shape.cols;
            const auto near = [&](int64_t c) {
                ahead(x + c), ahead(dy + c);
                if (dx) ahead(dx + c);
            };
            const auto gradient = [&](auto get, int64_t c) {
                const vf z = bias ? get(x + c) + get(bias + c) : get(x + c);
                return get(dy + c) * gelu_derivative<TANH>(z);
            };
            if (own == nullptr)
                for_lines<T>(n, near, [&](auto get, auto put, int64_t c, int) { put(dx + c, gradient(get, c)); });
            else
                for_lines<T>(n, near, [&](auto get, auto put, int64_t c, int) {
                    const vf d = gradient(get, c);
                    put(own + c, get(own + c) + d);
                    if (a.dx) put(dx + c, d);
                });
        }
    }
}

template <class T>
void backward(const GeluBwd& a, const float* bias, float* sums, int64_t chunks) {
    a.tanh ? backward<true, T>(a, bias, sums, chunks) : backward<false, T>(a, bias, sums, chunks);
}

}  // namespace

bool gelu_bwd(const GeluBwd& a) {
    if (a.dx == nullptr && a.dbias == nullptr) return true;
    const int64_t chunks = chunks_of(a.rows);
    float* buffer = cpu::workspace((chunks + 1) * a.cols);
    if (buffer == nullptr) return false;
    const float* bias = as_floats(buffer, a.bias, a.bias_dtype, a.cols);
    float* sums = a.dbias ? buffer + a.cols : nullptr;
    if (a.dtype == DType::f32) backward<float>(a, bias, sums, chunks);
    if (a.dtype == DType::f16) backward<half>(a, bias, sums, chunks);
    if (a.dtype == DType::bf16) backward<bfloat>(a, bias, sums, chunks);
    if (a.dbias) {
        add_chunks(sums, chunks, a.cols);
        from_floats(a.dbias, sums, a.bias_dtype, a.cols);
    }
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
