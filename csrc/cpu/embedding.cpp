// Token and position embedding, forward and backward, for one instruction set.
//
// Forward: a place's result is scale * token row + position row, one pass. An index that is no row reads nothing and
// gives NaN: nobody may overlook that.
//
// Backward: the gradient of a table's row is the sum of dy over the places that used it. The places are sorted by row
// (counting sort, stable: within a row in the order of the text), and every row is written once, as the sum of its own
// places, kept in registers, or as 0. So the buffer need not be cleared first, 16-bit tables need no float32 copy, and
// no result depends on the number of threads. An index that is no row adds to none.
//
// Threads share columns and rows: all of them work even where one token fills the batch, and where there are more
// threads than strips of columns.

#include "kernels.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

constexpr int64_t kStrip = 8 * W;  // columns whose sums are kept in registers

template <class T>
void forward(const EmbeddingFwd& a) {
    const int64_t n = a.cols;
    const vf scale = splat(a.scale), nan = splat(__builtin_nanf(""));
    [[maybe_unused]] const int threads = cpu::thread_count(a.places, a.places * n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t place = 0; place < a.places; ++place) {
        const int64_t row = a.tokens[place];
        const int64_t at = a.position == nullptr ? 0 : a.positions ? a.positions[place] : place % a.length;
        T* y = static_cast<T*>(a.y) + place * n;
        if (row < 0 || row >= a.token_rows || (a.position && (at < 0 || at >= a.position_rows))) {
            for_columns(n, [&](auto, auto put, int64_t c) { put(y + c, nan); });
            continue;
        }
        const T* token = static_cast<const T*>(a.token) + row * n;
        const T* position = static_cast<const T*>(a.position) + at * n;
        if (a.position)
            for_columns(n,
                        [&](auto get, auto put, int64_t c) { put(y + c, get(token + c) * scale + get(position + c)); });
        else
            for_columns(n, [&](auto get, auto put, int64_t c) { put(y + c, get(token + c) * scale); });
    }
}

}  // namespace

bool embedding_fwd(const EmbeddingFwd& a) {
    if (a.dtype == DType::f32) forward<float>(a);
    if (a.dtype == DType::f16) forward<half>(a);
    if (a.dtype == DType::bf16) forward<bfloat>(a);
    return true;
}

namespace {

// order: all places that name a row, by row; begin[r]: where those of row r begin, begin[table_rows] their number.
void sort_places(const EmbeddingBwd& a, int64_t* order, int64_t* begin) {
    const auto row_of = [&](int64_t place) { return a.indices ? a.indices[place] : place % a.length; };
    std::memset(begin, 0, (a.table_rows + 1) * sizeof(int64_t));
    for (int64_t place = 0; place < a.places; ++place) {
        const int64_t row = row_of(place);
        if (row >= 0 && row < a.table_rows) ++begin[row];
    }
    // First the end of each row's places; dealt out from the last one backwards, they make it the beginning.
    int64_t total = 0;
    for (int64_t row = 0; row <= a.table_rows; ++row) begin[row] = total += begin[row];
    for (int64_t place = a.places - 1; place >= 0; --place) {
        const int64_t row = row_of(place);
        if (row >= 0 && row < a.table_rows) order[--begin[row]] = place;
    }
}

// K vectors of one row of the table, the last of them with `rest` columns where rest is not 0.
template <int K, class T>
void sum_strip(const EmbeddingBwd& a, const int64_t* places, int64_t count, T* out, int64_t c, int64_t rest) {
    vf total[K] = {};
    const T* dy = static_cast<const T*>(a.dy) + c;
    const int whole = rest ? K - 1 : K;
    for (int64_t i = 0; i < count; ++i) {
        const T* row = dy + places[i] * a.dy_stride;
        for (int k = 0; k < whole; ++k) total[k] += load(row + k * W);
        if (rest) total[K - 1] += load_first(row + (K - 1) * W, rest);
    }
    const vf scale = splat(a.scale);
    for (int k = 0; k < whole; ++k) store(out + c + k * W, total[k] * scale);
    if (rest) store_first(out + c + (K - 1) * W, total[K - 1] * scale, rest);
}

template <class T>
void backward(const EmbeddingBwd& a, const int64_t* order, const int64_t* begin) {
    const int64_t strips = (a.cols + kStrip - 1) / kStrip;
    const int threads = cpu::thread_count(strips * a.table_rows, (a.places + a.table_rows) * a.cols);
    const int64_t shares = (threads + strips - 1) / strips;
    // Shares of rows with about as much to read and write each: row r comes after r rows and begin[r] places.
    const int64_t work = a.table_rows + begin[a.table_rows];
    // A table of mostly unused rows is cleared by whole pieces of memory first (50304 x 384 for 2048 places, Zen 5: 3
    // times faster).
    const bool sparse = a.table_rows > 2 * a.places;
    if (sparse) {
        const int64_t bytes = a.table_rows * a.cols * static_cast<int64_t>(sizeof(T));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int share = 0; share < threads; ++share) {
            const int64_t from = bytes * share / threads, to = bytes * (share + 1) / threads;
            std::memset(static_cast<char*>(a.dtable) + from, 0, to - from);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < strips * shares; ++task) {
        const int64_t c = task / shares * kStrip, share = task % shares;
        const int64_t from = work * share / shares, to = work * (share + 1) / shares;
        int64_t row = 0;
        for (int64_t high = a.table_rows; row < high;) {
            const int64_t middle = (row + high) / 2;
            if (middle + begin[middle] < from)
                row = middle + 1;
            else
                high = middle;
        }
        for (; row < a.table_rows && row + begin[row] < to; ++row) {
            T* out = static_cast<T*>(a.dtable) + row * a.cols;
            const int64_t count = begin[row + 1] - begin[row];
            const int64_t* places = order + begin[row];
            if (sparse && count == 0) continue;
            if (c + kStrip <= a.cols) {
                sum_strip<8, T>(a, places, count, out, c, 0);
                continue;
            }
            int64_t at = c;
            for (; at + W <= a.cols; at += W) sum_strip<1, T>(a, places, count, out, at, 0);
            if (at < a.cols) sum_strip<1, T>(a, places, count, out, at, a.cols - at);
        }
    }
}

}  // namespace

bool embedding_bwd(const EmbeddingBwd& a) {
    auto* order = reinterpret_cast<int64_t*>(cpu::workspace(2 * (a.places + a.table_rows + 1)));
    if (order == nullptr) return false;
    int64_t* begin = order + a.places;
    sort_places(a, order, begin);
    if (a.dtype == DType::f32) backward<float>(a, order, begin);
    if (a.dtype == DType::f16) backward<half>(a, order, begin);
    if (a.dtype == DType::bf16) backward<bfloat>(a, order, begin);
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
