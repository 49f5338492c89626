// The only header a kernel includes: what a GPU thread can do, under nvcc as the real thing, under any other compiler
// as a simulation on the CPU (simt_host.h). A kernel has no branch for either; inline assembly and <<<>>> are here
// alone.
//
// As in CUDA: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_*_sync, atomicAdd, __global__,
// __device__. From here: typed vectors of up to 16 bytes, shared memory, large arguments, cp.async, ldmatrix, mma,
// launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SIMT_DEVICE __device__ __forceinline__

namespace simt {

using half = __half;
using bfloat = __nv_bfloat16;
using Stream = cudaStream_t;

SIMT_DEVICE float to_float(float x) { return x; }
SIMT_DEVICE float to_float(half x) { return __half2float(x); }
SIMT_DEVICE float to_float(bfloat x) { return __bfloat162float(x); }

template <class T>
SIMT_DEVICE T from_float(float x);
template <>
SIMT_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
SIMT_DEVICE half from_float<half>(float x) {
    return __float2half_rn(x);
}
template <>
SIMT_DEVICE bfloat from_float<bfloat>(float x) {
    return __float2bfloat16_rn(x);
}

// N elements that lie together and are moved in one instruction: N * sizeof(T) is 2, 4, 8 or 16, and so is the
// alignment.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <class T, int N>
SIMT_DEVICE Vector<T, N> load(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <class T, int N>
SIMT_DEVICE void store(T* to, const Vector<T, N>& v) {
    *reinterpret_cast<Vector<T, N>*>(to) = v;
}

// The same to global memory alone, and never taken apart: nvcc stores the elements of `store` one by one in some
// kernels.
template <class T, int N>
SIMT_DEVICE void store_global(T* to, const Vector<T, N>& v) {
    const auto* words = reinterpret_cast<const uint32_t*>(&v);
    if constexpr (sizeof v == 16)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                     "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    else if constexpr (sizeof v == 8)
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                     "r"(words[1])
                     : "memory");
    else
        store<T, N>(to, v);
}

// 16 bytes from one place to another. Through load and store the compiler would often take them apart.
SIMT_DEVICE void copy16(void* to, const void* from) { *static_cast<uint4*>(to) = *static_cast<const uint4*>(from); }

// Shared memory of a block, of a size known to the compiler.
#define SIMT_SHARED(type, name, count) __shared__ __align__(16) type name[count]

// The dynamic shared memory of a block: arrays taken in the same order by every thread.
class SharedMemory {
  public:
    template <class T>
    SIMT_DEVICE T* take(int count) {
        extern __shared__ __align__(128) unsigned char simt_dynamic_shared[];
        T* mine = reinterpret_cast<T*>(simt_dynamic_shared + used_);
        used_ += (count * static_cast<int>(sizeof(T)) + 15) & ~15;
        return mine;
    }

  private:
    int used_ = 0;
};

// A large argument of a kernel, read where it lies: a plain one that is indexed may be copied for each thread.
#define SIMT_ARGUMENT(name, ...) const __grid_constant__ __VA_ARGS__ name

// Bytes that the arguments of a kernel may take together.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif

SIMT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory behind the thread's back; zeros where not `valid` (nothing is read then).
SIMT_DEVICE void cp_async16(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
SIMT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest N groups that this thread committed have arrived, for this thread to see.
template <int N>
SIMT_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Matrices of 8 x 8 two-byte elements from shared memory: lane 8 i + j gives the address of row j of matrix i. Of each,
// a lane gets the elements (lane / 4, 2 (lane % 4)) and the one to its right; transposed: those of the transpose.
SIMT_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
SIMT_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
SIMT_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
SIMT_DEVICE void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a b: a [16, 16] by rows, b [16, 8] by columns, two-byte elements in the fragments of PTX's mma.m16n8k16.
template <class T>
SIMT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SIMT_DEVICE void mma<bfloat>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
SIMT_DEVICE void mma<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers, rounded, in one register: `low` in the lower half.
template <class T>
SIMT_DEVICE uint32_t pack2(float low, float high) {
    const Vector<T, 2> v{{from_float<T>(low), from_float<T>(high)}};
    return *reinterpret_cast<const uint32_t*>(&v);
}

// 2^x to two units in the last place; results below the smallest normal number may be 0.
SIMT_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

inline void check(cudaError_t status, const std::string& what) {
    if (status != cudaSuccess)
        throw std::runtime_error(what + " on cuda: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                                 ")");
}

// Why a kernel's code cannot run on the current GPU; empty when it can.
inline std::string obstacle(void (*kernel)()) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) cudaGetLastError();  // it is told, and must not be found by who asks next
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

// Starts a kernel on a stream, and returns. No allocation and no waiting: a CUDA graph can capture it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            Arguments... arguments) {
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              name);
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess)
        check(status, std::string(name) + ", " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                          std::to_string(grid.z) + " blocks of " + std::to_string(block.x) + " threads with " +
                          std::to_string(shared_bytes) + " bytes of shared memory");
}

}  // namespace simt

#else

#include "simt_host.h"

#endif

namespace simt {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over the lanes of a warp, in every lane, in the same order each time.
SIMT_DEVICE float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
    return x;
}

}  // namespace simt
