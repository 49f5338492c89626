// Every kernel, at every instruction set of this CPU, on small inputs, held against plain loops in double precision:
// for processors that have no PyTorch to compare with (an Arm that QEMU plays, for one). A plain main; 0 is success.
//
// Inputs are multiples of 1/32 that every dtype holds exactly. Outputs start as NaN and end in elements that nobody may
// touch. Everything runs with one thread and with three, small as it is, and must give the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "ops.h"

using namespace tinygpt;

namespace {

const char* const kDTypes[] = {"float32", "float16", "bfloat16"};
constexpr double kTolerance[] = {1e-5, 2e-3, 1.6e-2};  // relative to the largest element
constexpr int64_t kGuard = 16;

struct {
    std::string isa, what;
    int checks = 0, failures = 0;
    uint64_t bits = 14695981039346656037u;  // of all outputs so far
} run;

struct Random {
    uint64_t state = 1;
    int below(int n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<int>((state >> 33) % static_cast<uint64_t>(n));
    }
} rng;

double half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

// A tensor in one dtype, seen as doubles from here.
struct Array {
    DType dtype;
    int64_t size;
    std::vector<uint8_t> bytes;

    Array(int64_t n, DType type) : dtype(type), size(n), bytes((n + kGuard) * width(), 0xff) {}
    int64_t width() const { return dtype == DType::f32 ? 4 : 2; }
    void* data() { return bytes.data(); }
    float* floats() { return reinterpret_cast<float*>(bytes.data()); }
    double operator[](int64_t i) const {
        uint16_t word;
        float value;
        std::memcpy(&word, &bytes[i * width()], 2);
        if (dtype == DType::f16) return half_value(word);
        const uint32_t widened = static_cast<uint32_t>(word) << 16;
        std::memcpy(&value, dtype == DType::f32 ? &bytes[i * 4] : reinterpret_cast<const uint8_t*>(&widened), 4);
        return value;
    }
    void set(int64_t i, float value) {  // exact, or this test would not know its own inputs
        uint32_t u;
        std::memcpy(&u, &value, 4);
        const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
        uint16_t word = static_cast<uint16_t>(u >> 16);
        if (dtype == DType::f16) word = static_cast<uint16_t>(sign | (magnitude ? (magnitude - 0x38000000) >> 13 : 0));
        dtype == DType::f32 ? std::memcpy(&bytes[i * 4], &value, 4) : std::memcpy(&bytes[i * 2], &word, 2);
    }
};

Array random(int64_t n, DType dtype, int spread = 64, float shift = 0) {
    Array a(n, dtype);
    for (int64_t i = 0; i < n; ++i) a.set(i, static_cast<float>(rng.below(2 * spread + 1) - spread) / 32 + shift);
    return a;
}

void fail(const std::string& name, const char* format, double a, double b, int64_t at) {
    char text[160];
    std::snprintf(text, sizeof text, format, a, b, static_cast<long>(at));
    std::printf("FAILED %s: %s, %s: %s\n", run.isa.c_str(), run.what.c_str(), name.c_str(), text);
    ++run.failures;
}

void near(const std::string& name, const Array& ours, const std::vector<double>& truth) {
    double largest = 0;
    for (const double value : truth)
        if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
    ++run.checks;
    for (int64_t i = 0; i < ours.size; ++i) {
        const double off = std::fabs(ours[i] - truth[i]);
        if (ours[i] == truth[i] || off <= kTolerance[static_cast<int>(ours.dtype)] * largest) continue;
        fail(name, "%.9g instead of %.9g at %ld", ours[i], truth[i], i);
        break;
    }
    for (size_t i = ours.size * ours.width(); i < ours.bytes.size(); ++i)
        if (ours.bytes[i] != 0xff) return fail(name, "written beyond its end%.0f%.0f, byte %ld", NAN, NAN, i);
    for (int64_t i = 0; i < ours.size * ours.width(); ++i) run.bits = (run.bits ^ ours.bytes[i]) * 1099511628211u;
}

void served(bool ok) {
    if (!ok) fail("the kernel", "returned false%.0f%.0f, %ld", NAN, NAN, 0);
}

std::string text(const char* op, DType dtype, std::initializer_list<int64_t> sizes) {
    std::string name = std::string(op) + " " + kDTypes[static_cast<int>(dtype)];
    for (const int64_t size : sizes) name += " " + std::to_string(size);
    return name;
}

void layer_norm(DType dtype, DType parameters, int64_t R, int64_t C, bool bias, bool residual) {
    run.what = text("layer_norm", dtype, {R, C, bias, residual});
    const int64_t stride = C + 3;
    const double eps = 1e-5;
    Array x = random(R * stride, dtype), add = random(R * C, dtype), weight = random(C, parameters, 16, 1);
    Array b = random(C, parameters), dy = random(R * stride, dtype), dh = random(R * C, dtype);
    Array y(R * C, dtype), h(R * C, dtype), mean(R, DType::f32), rstd(R, DType::f32);
    Array dx(R * C, dtype), dweight(C, parameters), dbias(C, parameters);

    LayerNormFwd f{};
    f.x = x.data(), f.x_stride = stride, f.dtype = dtype, f.rows = R, f.cols = C, f.eps = eps;
    f.residual = residual ? add.data() : nullptr, f.residual_stride = C, f.h = residual ? h.data() : nullptr;
    f.weight = weight.data(), f.weight_dtype = parameters;
    f.bias = bias ? b.data() : nullptr, f.bias_dtype = parameters;
    f.y = y.data(), f.mean = mean.floats(), f.rstd = rstd.floats();
    served(cpu::kernels().layer_norm_fwd(f));

    std::vector<double> hs(R * C), ys(R * C), means(R), rstds(R), dxs(R * C), dweights(C), dbiases(C);
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t c = 0; c < C; ++c) hs[r * C + c] = x[r * stride + c] + (residual ? add[r * C + c] : 0);
        if (residual)  // in its dtype it is what the backward sees
            for (int64_t c = 0; c < C; ++c) means[r] += h[r * C + c] / C;
        else
            for (int64_t c = 0; c < C; ++c) means[r] += hs[r * C + c] / C;
        double variance = 0, level = 0, along = 0;
        auto seen = [&](int64_t c) { return residual ? h[r * C + c] : hs[r * C + c]; };
        for (int64_t c = 0; c < C; ++c) variance += (seen(c) - means[r]) * (seen(c) - means[r]) / C;
        rstds[r] = 1 / std::sqrt(variance + eps);
        auto normal = [&](int64_t c) { return (seen(c) - means[r]) * rstds[r]; };
        for (int64_t c = 0; c < C; ++c) {
            const double d = dy[r * stride + c];
            ys[r * C + c] = normal(c) * weight[c] + (bias ? b[c] : 0);
            dweights[c] += d * normal(c), dbiases[c] += d;
            level += d * weight[c] / C, along += d * weight[c] * normal(c) / C;
        }
        for (int64_t c = 0; c < C; ++c)
            dxs[r * C + c] = rstds[r] * (dy[r * stride + c] * weight[c] - level - normal(c) * along) +
                             (residual ? dh[r * C + c] : 0);
    }
    near("y", y, ys);
    if (residual) near("h", h, hs);
    near("mean", mean, means);
    near("rstd", rstd, rstds);

    LayerNormBwd g{};
    g.dy = dy.data(), g.dy_stride = stride, g.dh = residual ? dh.data() : nullptr, g.dh_stride = C;
    g.x = residual ? h.data() : x.data(), g.x_stride = residual ? C : stride, g.dtype = dtype;
    g.weight = weight.data(), g.weight_dtype = parameters, g.mean = mean.floats(), g.rstd = rstd.floats();
    g.dx = dx.data(), g.dweight = dweight.data(), g.dbias = bias ? dbias.data() : nullptr, g.bias_dtype = parameters;
    g.rows = R, g.cols = C;
    served(cpu::kernels().layer_norm_bwd(g));
    near("dx", dx, dxs);
    near("dweight", dweight, dweights);
    if (bias) near("dbias", dbias, dbiases);
}

double gelu_of(double x, bool tanh) {
    const double inner = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
    return 0.5 * x * (1 + (tanh ? std::tanh(inner) : std::erf(x / std::sqrt(2))));
}
double gelu_slope(double x, bool tanh) {
    const double root = std::sqrt(2 / M_PI), t = std::tanh(root * (x + 0.044715 * x * x * x));
    if (tanh) return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x);
    return 0.5 * (1 + std::erf(x / std::sqrt(2))) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
}

void gelu(DType dtype, int64_t R, int64_t C, bool bias, bool tanh) {
    run.what = text("gelu", dtype, {R, C, bias, tanh});
    const int64_t stride = C + 5;
    Array x = random(R * stride, dtype, 127), b = random(C, dtype), dy = random(R * stride, dtype);
    Array y(R * C, dtype), dx(R * C, dtype), dbias(C, dtype);
    GeluFwd f{};
    f.x = x.data(), f.x_stride = stride, f.dtype = dtype, f.bias = bias ? b.data() : nullptr, f.bias_dtype = dtype;
    f.y = y.data(), f.tanh = tanh, f.rows = R, f.cols = C;
    served(cpu::kernels().gelu_fwd(f));
    GeluBwd g{};
    g.dy = dy.data(), g.dy_stride = stride, g.x = x.data(), g.x_stride = stride, g.dtype = dtype;
    g.bias = f.bias, g.bias_dtype = dtype, g.dx = dx.data(), g.dbias = bias ? dbias.data() : nullptr;
    g.tanh = tanh, g.rows = R, g.cols = C;
    served(cpu::kernels().gelu_bwd(g));
    std::vector<double> ys(R * C), dxs(R * C), dbiases(C);
    for (int64_t r = 0; r < R; ++r)
        for (int64_t c = 0; c < C; ++c) {
            const double u = x[r * stride + c] + (bias ? b[c] : 0);
            ys[r * C + c] = gelu_of(u, tanh);
            dxs[r * C + c] = dy[r * stride + c] * gelu_slope(u, tanh);
            dbiases[c] += dxs[r * C + c];
        }
    near("y", y, ys);
    near("dx", dx, dxs);
    if (bias) near("dbias", dbias, dbiases);
}

void embedding(DType dtype, int64_t places, int64_t length, int64_t rows, int64_t C, bool given) {
    run.what = text("embedding", dtype, {places, length, rows, C, given});
    const double scale = 0.5;
    Array token = random(rows * C, dtype), position = random((length + 2) * C, dtype), dy = random(places * C, dtype);
    Array y(places * C, dtype), dtoken(rows * C, dtype), dposition((length + 2) * C, dtype);
    std::vector<int64_t> tokens(places), positions(places);
    for (int64_t i = 0; i < places; ++i)
        tokens[i] = rng.below(rows), positions[i] = given ? rng.below(length + 2) : i % length;
    EmbeddingFwd f{};
    f.tokens = tokens.data(), f.positions = given ? positions.data() : nullptr, f.places = places, f.length = length;
    f.token = token.data(), f.token_rows = rows, f.position = position.data(), f.position_rows = length + 2;
    f.y = y.data(), f.dtype = dtype, f.cols = C, f.scale = scale;
    served(cpu::kernels().embedding_fwd(f));
    EmbeddingBwd g{};
    g.dy = dy.data(), g.dy_stride = C, g.indices = tokens.data(), g.places = places, g.length = length;
    g.dtable = dtoken.data(), g.table_rows = rows, g.dtype = dtype, g.cols = C, g.scale = scale;
    served(cpu::kernels().embedding_bwd(g));
    g.indices = f.positions, g.dtable = dposition.data(), g.table_rows = length + 2, g.scale = 1;
    served(cpu::kernels().embedding_bwd(g));
    std::vector<double> ys(places * C), dtokens(rows * C), dpositions((length + 2) * C);
    for (int64_t i = 0; i < places; ++i)
        for (int64_t c = 0; c < C; ++c) {
            ys[i * C + c] = scale * token[tokens[i] * C + c] + position[positions[i] * C + c];
            dtokens[tokens[i] * C + c] += scale * dy[i * C + c];
            dpositions[positions[i] * C + c] += dy[i * C + c];
        }
    near("y", y, ys);
    near("dtoken", dtoken, dtokens);
    near("dposition", dposition, dpositions);
}

// epilogue: 0 nothing, 1 bias and addend, 2 factor, 3 bias and GELU with its slope.
void gemm(int64_t M, int64_t N, int64_t K, bool a_transposed, bool b_transposed, int epilogue) {
    run.what = text("gemm", DType::f32, {M, N, K, a_transposed, b_transposed, epilogue});
    Array a = random(M * K, DType::f32), b = random(K * N, DType::f32), bias = random(N, DType::f32);
    Array add = random(M * N, DType::f32), factor = random(M * N, DType::f32);
    Array c(M * N, DType::f32), slope(M * N, DType::f32);
    Gemm g{};
    g.a = a.floats(), g.a_row = a_transposed ? 1 : K, g.a_col = a_transposed ? M : 1;
    g.b = b.floats(), g.b_row = b_transposed ? 1 : N, g.b_col = b_transposed ? K : 1;
    g.c = c.floats(), g.c_row = N, g.m = M, g.n = N, g.k = K;
    g.add_row = g.factor_row = g.slope_row = N, g.activation = epilogue == 3 ? Activation::gelu : Activation::none;
    if (epilogue == 1 || epilogue == 3) g.bias = bias.floats();
    if (epilogue == 1) g.add = add.floats();
    if (epilogue == 2) g.factor = factor.floats();
    if (epilogue == 3) g.slope = slope.floats();
    served(cpu::kernels().gemm(g));
    std::vector<double> cs(M * N), slopes(M * N);
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) {
            double u = g.bias ? bias[j] : 0;
            for (int64_t k = 0; k < K; ++k) u += a[i * g.a_row + k * g.a_col] * b[k * g.b_row + j * g.b_col];
            if (g.add) u += add[i * N + j];
            if (g.factor) u *= factor[i * N + j];
            cs[i * N + j] = epilogue == 3 ? gelu_of(u, false) : u;
            slopes[i * N + j] = gelu_slope(u, false);
        }
    near("c", c, cs);
    if (g.slope) near("slope", slope, slopes);
}

// Word s % 4 of Philox4x32-10 at (head, t, s / 4, 0), as every backend draws dropout.
uint32_t philox(uint64_t seed, uint32_t head, uint32_t t, uint32_t s) {
    uint32_t c[4] = {head, t, s / 4, 0}, k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p = uint64_t{0xD2511F53} * c[0], q = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(q >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(q),
                                  static_cast<uint32_t>(p >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p)};
        std::memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
    }
    return c[s % 4];
}

void attention(DType dtype, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, bool causal, bool lengths,
               double p) {
    run.what = text("attention", dtype, {T, S, H, K, D, causal, lengths, p > 0});
    const int64_t B = 3, E = H + 2 * K, shared = H / K;
    const int64_t kv_lengths[] = {S, 0, S / 2 + 1}, seed = -5;
    const double scale = 1 / std::sqrt(static_cast<double>(D)), keep = 1 / (1 - p);
    Array q = random(B * T * H * D, dtype), kv = random(B * S * E * D, dtype, 48),
          dy = random(B * T * H * D, dtype, 32);
    Array y(B * T * H * D, dtype), lse(B * H * T, DType::f32);
    Array dq(B * T * H * D, dtype), dk(B * S * K * D, dtype), dv(B * S * K * D, dtype);
    auto heads = [&](Array& a, int64_t tokens, int64_t count, int64_t first) {
        return Heads{&a.bytes[first * D * a.width()], tokens * count * D, count * D, D};
    };
    auto gradient = [&](Array& a, int64_t tokens, int64_t count) {
        return HeadsOut{a.data(), tokens * count * D, count * D, D};
    };
    AttentionFwd f{};
    f.q = heads(q, T, H, 0), f.k = heads(kv, S, E, 0), f.v = heads(kv, S, E, K);
    f.B = B, f.T = T, f.S = S, f.H = H, f.K = K, f.D = D, f.dtype = dtype, f.causal = causal, f.scale = scale;
    f.kv_lengths = lengths ? kv_lengths : nullptr, f.seed = p > 0 ? &seed : nullptr;
    f.drop_below = static_cast<uint32_t>(std::llround(p * 4294967296.0)), f.inverse_keep = keep;
    f.y = y.data(), f.lse = lse.floats();
    served(cpu::kernels().attention_fwd(f));

    std::vector<double> ys(y.size), lses(lse.size), dqs(dq.size), dks(dk.size), dvs(dv.size), w(S), dw(S);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < H; ++h)
            for (int64_t t = 0; t < T; ++t) {
                const int64_t valid = lengths ? kv_lengths[b] : S, row = ((b * T + t) * H + h) * D;
                const int64_t seen = causal ? std::max<int64_t>(0, std::min(valid, valid - T + t + 1)) : valid;
                auto key = [&](int64_t s, int64_t d) { return kv[((b * S + s) * E + h / shared) * D + d]; };
                auto value = [&](int64_t s, int64_t d) { return kv[((b * S + s) * E + K + h / shared) * D + d]; };
                auto own = [&](int64_t s, int64_t d) { return ((b * S + s) * K + h / shared) * D + d; };
                auto kept = [&](int64_t s) {
                    return p > 0 ? (philox(seed, b * H + h, t, s) < f.drop_below ? 0 : keep) : 1;
                };
                double top = -INFINITY, sum = 0, level = 0;
                for (int64_t s = 0; s < seen; ++s) {
                    w[s] = 0;
                    for (int64_t d = 0; d < D; ++d) w[s] += q[row + d] * key(s, d) * scale;
                    top = std::fmax(top, w[s]);
                }
                for (int64_t s = 0; s < seen; ++s) sum += w[s] = std::exp(w[s] - top);
                lses[(b * H + h) * T + t] = seen ? top + std::log(sum) : -INFINITY;
                for (int64_t s = 0; s < seen; ++s) {
                    w[s] /= sum, dw[s] = 0;
                    for (int64_t d = 0; d < D; ++d) {
                        ys[row + d] += kept(s) * w[s] * value(s, d);
                        dvs[own(s, d)] += kept(s) * w[s] * dy[row + d];
                        dw[s] += kept(s) * dy[row + d] * value(s, d);
                    }
                    level += w[s] * dw[s];
                }
                for (int64_t s = 0; s < seen; ++s)
                    for (int64_t d = 0; d < D; ++d) {
                        dqs[row + d] += scale * w[s] * (dw[s] - level) * key(s, d);
                        dks[own(s, d)] += scale * w[s] * (dw[s] - level) * q[row + d];
                    }
            }
    near("y", y, ys);
    near("lse", lse, lses);
    AttentionBwd g{};
    static_cast<Attention&>(g) = f;
    g.y = heads(y, T, H, 0), g.dy = heads(dy, T, H, 0), g.lse = lse.floats();
    g.dq = gradient(dq, T, H), g.dk = gradient(dk, S, K), g.dv = gradient(dv, S, K);
    served(cpu::kernels().attention_bwd(g));
    near("dq", dq, dqs);
    near("dk", dk, dks);
    near("dv", dv, dvs);
}

// The columns from `vocab` on are padding. With slices, the columns come in two calls.
void cross_entropy(DType dtype, int64_t R, int64_t V, int64_t vocab, bool slices, float smoothing) {
    run.what = text("cross_entropy", dtype, {R, V, vocab, slices, smoothing > 0});
    const int64_t ignored = -100, cut = vocab / 2, stride = V + 3;
    Array z = random(R * stride, dtype, 127), dz(R * V, dtype), lse(R, DType::f32), loss(1, DType::f32);
    const float denominator = 3.5f, dloss = 0.75f;
    std::vector<int64_t> targets(R);
    std::vector<double> state(2 * R);
    for (int64_t r = 0; r < R; ++r) targets[r] = r % 4 == 3 ? ignored : rng.below(static_cast<int>(vocab));
    CrossEntropyFwd f{};
    f.logits = z.data(), f.stride = stride, f.dtype = dtype, f.targets = targets.data(), f.ignore_index = ignored;
    f.rows = R, f.cols = vocab, f.classes = vocab, f.smoothing = smoothing, f.denominator = &denominator;
    f.lse = lse.floats(), f.loss = loss.floats();
    if (slices) {
        f.state = state.data(), f.cols = cut, f.lse = f.loss = nullptr;
        served(cpu::kernels().cross_entropy_fwd(f));
        f.logits = &z.bytes[cut * z.width()], f.first = cut, f.cols = vocab - cut;
        f.lse = lse.floats(), f.loss = loss.floats();
    }
    served(cpu::kernels().cross_entropy_fwd(f));
    CrossEntropyBwd g{};
    g.logits = z.data(), g.stride = stride, g.dtype = dtype, g.targets = targets.data(), g.ignore_index = ignored;
    g.lse = lse.floats(), g.dloss = &dloss, g.denominator = &denominator, g.dlogits = dz.data(), g.dlogits_stride = V;
    g.rows = R, g.cols = V, g.vocab = g.classes = vocab, g.smoothing = smoothing;
    served(cpu::kernels().cross_entropy_bwd(g));
    std::vector<double> lses(R), losses(1), dzs(R * V);
    for (int64_t r = 0; r < R; ++r) {
        double sum = 0, mean = 0;
        for (int64_t v = 0; v < vocab; ++v) sum += std::exp(z[r * stride + v]), mean += z[r * stride + v] / vocab;
        lses[r] = std::log(sum);
        if (targets[r] == ignored) continue;
        losses[0] += (lses[r] - (1 - smoothing) * z[r * stride + targets[r]] - smoothing * mean) / denominator;
        for (int64_t v = 0; v < vocab; ++v)
            dzs[r * V + v] =
                (std::exp(z[r * stride + v] - lses[r]) - smoothing / vocab - (v == targets[r] ? 1 - smoothing : 0)) *
                dloss / denominator;
    }
    near("lse", lse, lses);
    near("loss", loss, losses);
    near("dlogits", dz, dzs);
}

void adamw(DType dtype, DType moments, int64_t n) {
    run.what = text("adamw_", dtype, {static_cast<int>(moments), n});
    AdamW a{nullptr, 2, 3, 0.125, 0.75, 0.875, 1e-8, 0.1, 0.5};
    std::vector<Array> p, g, m, v;
    std::vector<AdamWTensor> tensors;
    std::vector<std::vector<double>> ps, ms, vs;
    for (const int64_t size : {n, int64_t{2300}}) {
        p.push_back(random(size, dtype)), g.push_back(random(size, dtype)), m.push_back(random(size, moments));
        v.push_back(random(size, moments, 32, 1.5));
        ps.emplace_back(size), ms.emplace_back(size), vs.emplace_back(size);
        for (int64_t i = 0; i < size; ++i) {
            const double d = g.back()[i] * a.grad_scale;
            ms.back()[i] = a.beta1 * m.back()[i] + (1 - a.beta1) * d;
            vs.back()[i] = a.beta2 * v.back()[i] + (1 - a.beta2) * d * d;
            ps.back()[i] = (1 - a.lr * a.weight_decay) * p.back()[i] -
                           a.lr / (1 - std::pow(a.beta1, a.step)) * ms.back()[i] /
                               (std::sqrt(vs.back()[i] / (1 - std::pow(a.beta2, a.step))) + a.eps);
        }
    }
    for (int i = 0; i < 2; ++i)
        tensors.push_back({p[i].data(), g[i].data(), m[i].data(), v[i].data(), p[i].size, dtype, dtype, moments});
    a.tensors = tensors.data();
    served(cpu::kernels().adamw_(a));
    for (int i = 0; i < 2; ++i)
        near("param", p[i], ps[i]), near("exp_avg", m[i], ms[i]), near("exp_avg_sq", v[i], vs[i]);
}

void clip_grad_norm(DType dtype, int64_t n, double max_norm) {
    run.what = text("clip_grad_norm_", dtype, {n, static_cast<int64_t>(max_norm)});
    Array a = random(n, dtype), b = random(3000, dtype), norm(1, DType::f32);
    std::vector<GradTensor> tensors = {{a.data(), n, dtype}, {b.data(), b.size, dtype}};
    std::vector<double> as(n), bs(b.size);
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += a[i] * a[i];
    for (int64_t i = 0; i < b.size; ++i) squares += b[i] * b[i];
    const double factor = std::fmin(1, max_norm / (std::sqrt(squares) + 1e-6));
    for (int64_t i = 0; i < n; ++i) as[i] = a[i] * factor;
    for (int64_t i = 0; i < b.size; ++i) bs[i] = b[i] * factor;
    served(cpu::kernels().clip_grad_norm_({tensors.data(), 2, max_norm, norm.floats()}));
    near("norm", norm, {std::sqrt(squares)});
    near("grad", a, as);
    near("grad", b, bs);
}

void everything() {
    rng = Random{};
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const int64_t C : {3, 17, 64, 65, 300})
            for (const bool residual : {false, true}) {
                layer_norm(dtype, dtype, 5, C, true, residual);
                layer_norm(dtype, DType::f32, 37, C, false, residual);
            }
        for (const int64_t C : {1, 17, 64, 257})
            for (const bool tanh : {false, true}) gelu(dtype, 7, C, true, tanh), gelu(dtype, 33, C, false, tanh);
        for (const bool given : {false, true})
            embedding(dtype, 24, 8, 11, 33, given), embedding(dtype, 51, 17, 65, 64, given);
        for (const bool slices : {false, true})
            for (const float smoothing : {0.0f, 0.125f}) {
                cross_entropy(dtype, 5, 65, 65, slices, smoothing);
                cross_entropy(dtype, 33, 23, 17, slices, smoothing);
                cross_entropy(dtype, 3, 1100, 1100, slices, smoothing);
            }
        for (const int64_t n : {1, 17, 5000}) {
            adamw(dtype, dtype, n), adamw(dtype, DType::f32, n);
            clip_grad_norm(dtype, n, 1), clip_grad_norm(dtype, n, 1000000);
        }
        for (const bool causal : {false, true}) {
            attention(dtype, 5, 5, 2, 2, 16, causal, false, 0);
            attention(dtype, 17, 23, 4, 2, 33, causal, true, 0);
            attention(dtype, 70, 70, 2, 1, 64, causal, false, 0.25);
        }
    }
    for (const bool a : {false, true})
        for (const bool b : {false, true})
            for (const int epilogue : {0, 1, 2, 3}) {
                gemm(1, 1, 1, a, b, epilogue);
                gemm(13, 65, 33, a, b, epilogue);
                gemm(70, 130, 300, a, b, epilogue);
            }
}

}  // namespace

int main() {
    cpu::set_grain(1);  // small as the cases are, threads share them
    for (const std::string& isa : cpu::supported_isas()) {
        cpu::set_isa(isa);
        uint64_t alone = 0;
        for (const int threads : {1, 3}) {
#ifdef _OPENMP
            omp_set_num_threads(threads);
#endif
            run.isa = isa + ", " + std::to_string(threads) + " threads", run.bits = 14695981039346656037u;
            everything();
            if (threads == 1) alone = run.bits;
        }
        run.what = "everything";
        if (run.bits != alone) fail("bits", "differ with the number of threads%.0f%.0f, %ld", NAN, NAN, 0);
        std::printf("%s: %d arrays checked so far, %d failures\n", isa.c_str(), run.checks, run.failures);
    }
    return run.failures != 0;
}
