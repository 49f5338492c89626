// simt.cuh without a GPU: every thread of a block is a fiber, what a warp does together is a meeting of 32 of them.
//
// What is inline here is compiled into the kernels, whose loads and stores report to simt_check.cpp; so all state stays
// behind functions of simt_host.cpp, which are not compiled that way.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define SIMT_DEVICE inline

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

using Stream = void*;

namespace host {

// Where in the source something happens.
struct Place {
    const char* file;
    int line;

    // As a default argument: the place of the call.
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Ends the launch with an exception that names kernel, block, thread and place.
[[noreturn]] void fault(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

void barrier(Place place);
void warp_barrier(unsigned mask, Place place);

// A meeting of the lanes in `mask`: each brings what is `mine`, the last to arrive has `meet` read and write them all.
using Meet = void (*)(void* const* lanes, unsigned mask, Place place);
void collective(const char* what, unsigned mask, void* mine, Meet meet, Place place);

void* shared_array(size_t bytes, Place place);
void* dynamic_array(int ordinal, size_t bytes, Place place);

// An access of `bytes` bytes that must be aligned to as many.
void touch(const void* p, size_t bytes, bool write, Place place);

void cp_async(void* to, const void* from, bool valid, Place place);
void cp_async_commit();
void cp_async_wait(int pending, Place place);
float atomic_add(float* to, float value, Place place);

struct Shuffle {
    uint32_t value, result;
    int from;
};
void meet_shuffle(void* const* lanes, unsigned mask, Place place);

struct Matrices {
    const void* row;
    uint32_t* result;
    int count;
    bool transposed;
};
void meet_ldmatrix(void* const* lanes, unsigned mask, Place place);

struct Product {
    uint32_t a[4], b[2];
    float d[4];
    bool is_bfloat;
};
void meet_mma(void* const* lanes, unsigned mask, Place place);

struct Argument {
    const void* data;
    size_t bytes;
};
struct Body {
    const void* closure;
    void (*run)(const void* closure);
    const void* kernel;         // the same as a function and what it is given: for who runs it elsewhere
    const Argument* arguments;  // the last of them is {}
};
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
inline float bfloat_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return __builtin_bit_cast(float, wide);
}
inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);  // stays NaN
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace host

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(half x) { return host::half_to_float(x.bits); }
inline float to_float(bfloat x) { return host::bfloat_to_float(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline half from_float<half>(float x) {
    return {host::float_to_half(x)};
}
template <>
inline bfloat from_float<bfloat>(float x) {
    return {host::float_to_bfloat(x)};
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <class T, int N>
inline Vector<T, N> load(const T* from, host::Place place = host::Place::here()) {
    host::touch(from, sizeof(T) * N, false, place);
    Vector<T, N> v;
    std::memcpy(&v, from, sizeof v);  // reported once more at most, which is not counted
    return v;
}
template <class T, int N>
inline void store(T* to, const Vector<T, N>& v, host::Place place = host::Place::here()) {
    host::touch(to, sizeof(T) * N, true, place);
    std::memcpy(to, &v, sizeof v);
}

template <class T, int N>
inline void store_global(T* to, const Vector<T, N>& v, host::Place place = host::Place::here()) {
    store<T, N>(to, v, place);
}

inline void copy16(void* to, const void* from, host::Place place = host::Place::here()) {
    store(static_cast<uint32_t*>(to), load<uint32_t, 4>(static_cast<const uint32_t*>(from), place), place);
}

#define SIMT_SHARED(type, name, count) \
    type* const name =                 \
        static_cast<type*>(::simt::host::shared_array(sizeof(type) * (count), ::simt::host::Place::here()))

class SharedMemory {
  public:
    template <class T>
    T* take(int count, host::Place place = host::Place::here()) {
        return static_cast<T*>(host::dynamic_array(used_++, sizeof(T) * count, place));
    }

  private:
    int used_ = 0;
};

#define SIMT_ARGUMENT(name, ...) const __VA_ARGS__& name
constexpr int kArgumentBytes = 32764;

inline void cp_async16(void* to, const void* from, bool valid = true, host::Place place = host::Place::here()) {
    host::cp_async(to, from, valid, place);
}
inline void cp_async_commit() { host::cp_async_commit(); }
template <int N>
inline void cp_async_wait(host::Place place = host::Place::here()) {
    host::cp_async_wait(N, place);
}

template <int N>
inline void ldmatrix(uint32_t (&r)[N], const void* row, host::Place place = host::Place::here()) {
    host::Matrices mine{row, r, N, false};
    host::collective("ldmatrix", ~0u, &mine, host::meet_ldmatrix, place);
}
template <int N>
inline void ldmatrix_transposed(uint32_t (&r)[N], const void* row, host::Place place = host::Place::here()) {
    host::Matrices mine{row, r, N, true};
    host::collective("ldmatrix", ~0u, &mine, host::meet_ldmatrix, place);
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                host::Place place = host::Place::here()) {
    host::Product mine{{a[0], a[1], a[2], a[3]},
                       {b[0], b[1]},
                       {d[0], d[1], d[2], d[3]},
                       sizeof(T) == 2 && T(from_float<T>(1.0f)).bits == 0x3f80};
    host::collective("mma", ~0u, &mine, host::meet_mma, place);
    for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}

template <class T>
inline uint32_t pack2(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline std::string obstacle(void (*)()) { return ""; }
inline float exp2_fast(float x) { return std::exp2(x); }

namespace host {

template <class... Parameters>
void launch_with(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                 Parameters... parameters) {
    const auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(parameters...); };
    using Call = decltype(call);
    const Argument arguments[] = {{&parameters, sizeof parameters}..., {}};
    launch(name, grid, block, shared_bytes,
           {&call, [](const void* p) __attribute__((no_sanitize("thread"))) { (*static_cast<Call*>(p))(); },
            reinterpret_cast<const void*>(kernel), arguments});
}

}  // namespace host

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            Arguments... arguments) {
    host::launch_with<Parameters...>(name, kernel, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
}

}  // namespace simt

#define threadIdx (::simt::host::thread_index())
#define blockIdx (::simt::host::block_index())
#define blockDim (::simt::host::block_size())
#define gridDim (::simt::host::grid_size())

inline void __syncthreads(simt::host::Place place = simt::host::Place::here()) { simt::host::barrier(place); }
inline void __syncwarp(unsigned mask = ~0u, simt::host::Place place = simt::host::Place::here()) {
    simt::host::warp_barrier(mask, place);
}

template <class T>
inline T simt_shuffle(const char* what, unsigned mask, T value, int from, simt::host::Place place) {
    static_assert(sizeof(T) == 4, "shuffles move four bytes");
    simt::host::Shuffle mine{__builtin_bit_cast(uint32_t, value), 0, from};
    simt::host::collective(what, mask, &mine, simt::host::meet_shuffle, place);
    return __builtin_bit_cast(T, mine.result);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, simt::host::Place place = simt::host::Place::here()) {
    return simt_shuffle("__shfl_sync", mask, value, from & 31, place);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, simt::host::Place place = simt::host::Place::here()) {
    return simt_shuffle("__shfl_xor_sync", mask, value, simt::host::lane() ^ flip, place);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int by, simt::host::Place place = simt::host::Place::here()) {
    const int from = simt::host::lane() + by;
    return simt_shuffle("__shfl_down_sync", mask, value, from < 32 ? from : simt::host::lane(), place);
}
inline float atomicAdd(float* to, float value, simt::host::Place place = simt::host::Place::here()) {
    return simt::host::atomic_add(to, value, place);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }  // on a GPU to two units in the last place
