// What a rung is given. A rung is one .cu file: kernels, a function that launches them, and TINYGPT_RUNG at the end.
//
// Attention is causal: query t sees the keys 0 to t, weighted by softmax(q k / sqrt(D)). Every size must come out right
// that `tinygpt ladder` tries: T is any number, cols a multiple of 8.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>

#include "../simt.cuh"

namespace ladder {

using simt::bfloat;

constexpr int D = 64;             // numbers of a head
constexpr float kScale = 0.125f;  // 1 / sqrt(D)

struct Attention {
    const bfloat *q, *k, *v;  // [heads, T, D]
    bfloat* y;                // [heads, T, D]
    float* scores;            // [heads, T, T]: room for who wants it
    int heads, T;
};

struct LayerNorm {
    const bfloat *x, *weight, *bias;  // [rows, cols], [cols], [cols]
    bfloat* y;                        // [rows, cols]
    int rows, cols;
    float eps;
};

inline unsigned divided(int a, int b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace ladder

// `function` takes the arguments and a simt::Stream. What it throws is handed back as text.
#define TINYGPT_RUNG(Arguments, function)                                                                          \
    extern "C" __attribute__((visibility("default"))) const char* tinygpt_rung(const Arguments* a, void* stream) { \
        static char error[1024];                                                                                   \
        try {                                                                                                      \
            function(*a, static_cast<simt::Stream>(stream));                                                       \
            return nullptr;                                                                                        \
        } catch (const std::exception& e) {                                                                        \
            std::snprintf(error, sizeof error, "%s", e.what());                                                    \
            return error;                                                                                          \
        }                                                                                                          \
    }
