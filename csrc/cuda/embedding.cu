// Token and position embedding, forward and backward.
//
// Forward: y = scale * token row + position row. An index that is no row reads nothing and gives NaN.
//
// Backward: the gradient of a table's row is the sum of dy over the places that used it. The places come sorted by row
// (stably: within a row in the order of the text), and are cut into chunks of equal length, one for each thread and its
// columns: a token that fills the batch costs no more than many rare ones. What of a row lies within one chunk is
// summed and written; where it goes on over a chunk's end, each chunk leaves its sum in `partial`, and a second kernel
// adds these in order. No atomics: the same call gives the same bits. An index that is no row adds to none.
//
// Positions that are not given need no sorting: row r was used by the places r, r + length, r + 2 length, ...

#include "kernels.h"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kPlaces = 2;  // that a thread of the forward has in flight,
template <int N>
constexpr int kBatch = N > 4 ? 4 : 8;  // and one of the backward: nvcc widens them as they come, more would not fit
constexpr int kChunk = 32;             // sorted places

SIMT_DEVICE bool is_row(int64_t index, int64_t rows) { return index >= 0 && index < rows; }

// A remainder of 64 bits is a function call, one of 32 a few instructions.
SIMT_DEVICE int64_t offset_of(int64_t place, int64_t length) {
    if ((place | length) >> 32) return place % length;
    return static_cast<uint32_t>(place) % static_cast<uint32_t>(length);
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kDealt) forward(EmbeddingFwd a, Deal deal) {
    constexpr int N = kLanes<T, VECTORS>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    if (mine.lane >= deal.lanes || c >= a.cols) return;
    int64_t row[kPlaces], at[kPlaces];
    bool known[kPlaces];
#pragma unroll
    for (int k = 0; k < kPlaces; ++k) {
        const int64_t place = mine.lane + k * deal.lanes;
        known[k] = false;
        if (place >= a.places) continue;
        row[k] = a.tokens[place];
        known[k] = is_row(row[k], a.token_rows);
        if (a.position == nullptr) continue;
        at[k] = a.positions ? a.positions[place] : offset_of(place, a.length);
        known[k] = known[k] && is_row(at[k], a.position_rows);
    }
    Floats<N> x[kPlaces];
#pragma unroll
    for (int k = 0; k < kPlaces; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[k].at[i] = NAN;
        if (!known[k]) continue;
        const auto token = simt::load<T, N>(static_cast<const T*>(a.token) + row[k] * a.cols + c);
        Floats<N> position = {};
        if (a.position) position = floats<N>(simt::load<T, N>(static_cast<const T*>(a.position) + at[k] * a.cols + c));
#pragma unroll
        for (int i = 0; i < N; ++i) x[k].at[i] = a.scale * simt::to_float(token.at[i]) + position.at[i];
    }
#pragma unroll
    for (int k = 0; k < kPlaces; ++k) {
        const int64_t place = mine.lane + k * deal.lanes;
        if (place < a.places) simt::store<T, N>(static_cast<T*>(a.y) + place * a.cols + c, rounded<T, N>(x[k]));
    }
}

template <class T, int N>
SIMT_DEVICE void put_row(const EmbeddingBwd& a, int64_t row, int c, Floats<N> total) {
#pragma unroll
    for (int i = 0; i < N; ++i) total.at[i] *= a.scale;
    simt::store<T, N>(static_cast<T*>(a.dtable) + row * a.cols + c, rounded<T, N>(total));
}

template <int N, class T>
SIMT_DEVICE void add(Floats<N>& total, const simt::Vector<T, N>& v) {
#pragma unroll
    for (int i = 0; i < N; ++i) total.at[i] += simt::to_float(v.at[i]);
}

// The row of `partial` that takes what a chunk knows of a row of the table: the last one in it, where that goes on in
// the next chunk; else the first one, which began in the chunk before.
SIMT_DEVICE int64_t slot_of(int64_t chunk, bool goes_on) { return 2 * chunk - (goes_on ? 0 : 1); }

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kDealt) sum_chunks(EmbeddingBwd a, Deal deal, const int64_t* order, float* partial) {
    constexpr int N = kLanes<T, VECTORS>, kHeld = kBatch<N>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    const int64_t begin = mine.lane * kChunk;
    if (mine.lane >= deal.lanes || c >= a.cols) return;
    const int64_t end = begin + kChunk < a.places ? begin + kChunk : a.places;
    const T* dy = static_cast<const T*>(a.dy) + c;
    Floats<N> total = {};
    bool began_before = begin > 0 && a.indices[begin - 1] == a.indices[begin];
    for (int64_t first = begin; first < end; first += kHeld) {
        bool goes_on[kHeld];  // whether the next place is of the same row
        simt::Vector<T, N> held[kHeld];
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            goes_on[k] = first + k + 1 < a.places && a.indices[first + k + 1] == a.indices[first + k];
            if (first + k < end) held[k] = simt::load<T, N>(dy + order[first + k] * a.dy_stride);
        }
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            if (first + k >= end) break;
            add<N>(total, held[k]);
            if (goes_on[k] && first + k + 1 < end) continue;
            const int64_t row = a.indices[first + k];
            if (is_row(row, a.table_rows)) {
                if (began_before || goes_on[k])
                    store_floats<N>(partial + slot_of(mine.lane, goes_on[k]) * a.cols + c, total);
                else
                    put_row<T, N>(a, row, c, total);
            }
            total = {};
            began_before = false;
        }
    }
}

// A thread for each end of a chunk: if a row of the table goes on there that began in this chunk, its sum over all.
template <class T, bool VECTORS>
__global__ void __launch_bounds__(kDealt) join_chunks(EmbeddingBwd a, Deal deal, const float* partial) {
    constexpr int N = kLanes<T, VECTORS>, kHeld = kBatch<N>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    const int64_t begin = mine.lane * kChunk;
    if (mine.lane >= deal.lanes || c >= a.cols) return;
    const int64_t row = a.indices[begin + kChunk - 1];
    if (!is_row(row, a.table_rows) || a.indices[begin + kChunk] != row) return;
    if (begin > 0 && a.indices[begin - 1] == row) return;
    Floats<N> total = parameters_as<N>(partial + slot_of(mine.lane, true) * a.cols + c);
    for (int64_t first = mine.lane + 1;; first += kHeld) {
        bool here[kHeld + 1];  // whether the row has the first place of a chunk
        Floats<N> part[kHeld];
#pragma unroll
        for (int k = 0; k <= kHeld; ++k)
            here[k] = (first + k) * kChunk < a.places && a.indices[(first + k) * kChunk] == row;
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (here[k]) part[k] = parameters_as<N>(partial + slot_of(first + k, here[k + 1]) * a.cols + c);
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            if (!here[k]) continue;
#pragma unroll
            for (int i = 0; i < N; ++i) total.at[i] += part[k].at[i];
        }
        if (!here[kHeld]) break;
    }
    put_row<T, N>(a, row, c, total);
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kDealt) sum_offsets(EmbeddingBwd a, Deal deal) {
    constexpr int N = kLanes<T, VECTORS>, kHeld = kBatch<N>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    const int64_t row = mine.lane;
    if (row >= deal.lanes || c >= a.cols) return;
    const T* dy = static_cast<const T*>(a.dy) + c;
    Floats<N> total = {};
    for (int64_t first = row; row < a.length && first < a.places; first += kHeld * a.length) {
        simt::Vector<T, N> held[kHeld];
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const int64_t place = first + k * a.length;
            if (place < a.places) held[k] = simt::load<T, N>(dy + place * a.dy_stride);
        }
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (first + k * a.length < a.places) add<N>(total, held[k]);
    }
    put_row<T, N>(a, row, c, total);
}

int64_t chunks_of(int64_t places) { return (places + kChunk - 1) / kChunk; }

template <class T>
void launch_forward(const EmbeddingFwd& a, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const int64_t lanes = (a.places + kPlaces - 1) / kPlaces;
    if (a.cols % N == 0 && aligned(a.token) && aligned(a.position) && aligned(a.y))
        launch_dealt<N>("embedding forward", forward<T, true>, lanes, a.cols, stream, a);
    else
        launch_dealt<1>("embedding forward", forward<T, false>, lanes, a.cols, stream, a);
}

template <class T, bool VECTORS>
void launch_backward(const EmbeddingBwd& a, const int64_t* order, float* partial, simt::Stream stream) {
    constexpr int N = kLanes<T, VECTORS>;
    if (a.indices == nullptr)
        return launch_dealt<N>("embedding backward", sum_offsets<T, VECTORS>, a.table_rows, a.cols, stream, a);
    const int64_t chunks = chunks_of(a.places);
    if (chunks == 0) return;
    launch_dealt<N>("embedding backward", sum_chunks<T, VECTORS>, chunks, a.cols, stream, a, order, partial);
    launch_dealt<N>("embedding backward, sums", join_chunks<T, VECTORS>, chunks - 1, a.cols, stream, a,
                    static_cast<const float*>(partial));
}

template <class T>
void launch_backward(const EmbeddingBwd& a, const int64_t* order, float* partial, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    if (a.cols % N == 0 && a.dy_stride % N == 0 && aligned(a.dy) && aligned(a.dtable))
        launch_backward<T, true>(a, order, partial, stream);
    else
        launch_backward<T, false>(a, order, partial, stream);
}

}  // namespace

void embedding_fwd(const EmbeddingFwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.dtype == DType::f32) launch_forward<float>(a, on);
    if (a.dtype == DType::f16) launch_forward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_forward<simt::bfloat>(a, on);
}

int64_t embedding_bwd_partial(int64_t places) { return places > kChunk ? 2 * (chunks_of(places) - 1) : 0; }

void embedding_bwd(const EmbeddingBwd& a, const int64_t* order, float* partial, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.dtype == DType::f32) launch_backward<float>(a, order, partial, on);
    if (a.dtype == DType::f16) launch_backward<simt::half>(a, order, partial, on);
    if (a.dtype == DType::bf16) launch_backward<simt::bfloat>(a, order, partial, on);
}

}  // namespace tinygpt::cuda
