// Mode `count`: what a kernel asks of the memory, warp by warp, as the hardware would serve it.
//
// The lanes of a warp that execute one instruction together make one request. Fibers run one after the other, so each
// thread keeps its addresses by instruction, and when its block is done the nth of every lane are put together.
//
// Global memory moves in sectors of 32 bytes: a request costs as many as it touches, and needs as many as its bytes
// fill. Shared memory has 32 banks of 4 bytes: a request takes as many turns as the busiest bank has different words;
// of 8 or 16 bytes a lane, a half or a quarter of the warp at a time. What is more than needed is what another layout
// would save. Caches are not simulated.

#include <algorithm>
#include <sstream>

#include "simt_runtime.h"

namespace simt::host {
namespace {

constexpr int kWidths = 5;  // 1, 2, 4, 8, 16 bytes

struct Traffic {
    uint64_t requests = 0, bytes = 0, units = 0, needed = 0;
    uint64_t by_width[kWidths] = {};  // bytes
};

struct Where {
    std::string place;
    bool global = false, write = false;
    size_t width = 0;
    uint64_t requests = 0, units = 0, needed = 0;
};

struct Counts {
    uint64_t launches = 0, blocks = 0, barriers = 0, warp_barriers = 0, shuffles = 0, matrices = 0, products = 0;
    uint64_t atomics = 0, waited = 0;
    Traffic of[2][2];  // shared, global; read, write
    std::map<Instruction, Where> wasteful;
};

std::map<std::string, Counts> counted;  // by kernel
Counts* now = nullptr;

int log_of(size_t bytes) { return bytes >= 16 ? 4 : bytes >= 8 ? 3 : bytes >= 4 ? 2 : bytes >= 2 ? 1 : 0; }

// How many different multiples of `unit` the accesses touch.
size_t different(std::vector<uintptr_t>& numbers) {
    std::sort(numbers.begin(), numbers.end());
    return std::unique(numbers.begin(), numbers.end()) - numbers.begin();
}

struct Cost {
    uint64_t units = 0, needed = 0;
};

Cost sectors(const std::vector<uintptr_t>& addresses, size_t bytes) {
    static std::vector<uintptr_t> touched, words;
    touched.clear();
    words.clear();
    for (const uintptr_t p : addresses) {
        for (uintptr_t at = p / 32; at <= (p + bytes - 1) / 32; ++at) touched.push_back(at);
        for (uintptr_t at = p / 2; at <= (p + bytes - 1) / 2; ++at) words.push_back(at);
    }
    return {different(touched), (different(words) * 2 + 31) / 32};
}

Cost turns(const uintptr_t* addresses, size_t count, size_t bytes) {
    static std::vector<uintptr_t> words;
    words.clear();
    for (size_t i = 0; i < count; ++i)
        for (uintptr_t at = addresses[i] / 4; at <= (addresses[i] + bytes - 1) / 4; ++at) words.push_back(at);
    const size_t all = different(words);
    uint64_t busiest[32] = {}, most = 1;
    for (size_t i = 0; i < all; ++i) most = std::max(most, ++busiest[words[i] % 32]);
    return {most, std::max<uint64_t>(1, (all + 31) / 32)};
}

void add(const Instruction& by, const Asked& asked, const std::vector<uintptr_t>& addresses, Cost cost) {
    Traffic& traffic = now->of[asked.global][asked.write];
    ++traffic.requests;
    traffic.bytes += addresses.size() * asked.bytes;
    traffic.by_width[log_of(asked.bytes)] += addresses.size() * asked.bytes;
    traffic.units += cost.units;
    traffic.needed += cost.needed;
    if (cost.units == cost.needed && !now->wasteful.count(by)) return;
    Where& where = now->wasteful[by];
    if (where.place.empty())
        where = {asked.place.file ? name_of(asked.place) : line_of(by.pc), asked.global, asked.write, asked.bytes};
    ++where.requests;
    where.units += cost.units;
    where.needed += cost.needed;
}

std::string traffic_json(const Traffic& t, const char* unit) {
    std::ostringstream out;
    out << "{\"requests\": " << t.requests << ", \"bytes\": " << t.bytes << ", \"" << unit << "\": " << t.units
        << ", \"needed\": " << t.needed << ", \"by_width\": {";
    const char* comma = "";
    for (int i = 0; i < kWidths; ++i)
        if (t.by_width[i]) {
            out << comma << "\"" << (1 << i) << "\": " << t.by_width[i];
            comma = ", ";
        }
    out << "}}";
    return out.str();
}

}  // namespace

void count_begin_launch() {
    if (runtime.mode != Mode::count) return;
    now = &counted[runtime.kernel];
    ++now->launches;
}

void count_access(const void* address, size_t bytes, bool write, const void* pc, Place place, bool waits) {
    if (runtime.running < 0 || !runtime.failure.empty()) return;
    const auto p = reinterpret_cast<uintptr_t>(address);
    Thread& thread = runtime.threads[runtime.running];
    const auto stack = reinterpret_cast<uintptr_t>(thread.stack);
    if ((p >= stack && p < stack + kStack) || (!write && is_constant(p))) return;
    const auto arena = reinterpret_cast<uintptr_t>(shared_arena());
    const bool global = p < arena || p >= arena + kArena;
    Asked& asked = thread.asked[{pc, place.line, write}];
    if (asked.addresses.empty()) asked = {place, std::min<size_t>(bytes, 16), global, write, {}};
    asked.addresses.push_back(p);
    if (global && !write && waits) now->waited += bytes;
}

void count_matrix(const void* const* rows, Place place) {
    std::vector<uintptr_t> addresses(8);
    for (int i = 0; i < 8; ++i) addresses[i] = reinterpret_cast<uintptr_t>(rows[i]);
    add({place.file, place.line, false}, {place, 16, false, false, {}}, addresses, turns(addresses.data(), 8, 16));
    ++now->matrices;
}

void count_event(Event event, uint64_t amount) {
    if (runtime.mode != Mode::count || now == nullptr) return;
    switch (event) {
        case Event::barrier:
            now->barriers += amount;
            break;
        case Event::warp_barrier:
            now->warp_barriers += amount;
            break;
        case Event::shuffle:
            now->shuffles += amount;
            break;
        case Event::product:
            now->products += amount;
            break;
        case Event::atomic:
            now->atomics += amount;
            break;
        case Event::waited:
            now->waited += amount;
            break;
    }
}

void count_block() {
    if (runtime.mode != Mode::count) return;
    ++now->blocks;
    const int threads = static_cast<int>(runtime.threads.size());
    for (int warp = 0; warp < threads; warp += kWarp) {
        const int end = std::min(warp + kWarp, threads);
        std::map<Instruction, size_t> most;
        for (int i = warp; i < end; ++i)
            for (const auto& [key, asked] : runtime.threads[i].asked)
                most[key] = std::max(most[key], asked.addresses.size());
        std::vector<uintptr_t> addresses;
        for (const auto& [key, times] : most) {
            const Asked* lanes[kWarp];
            const Asked* some = nullptr;
            for (int i = warp; i < end; ++i) {
                const auto found = runtime.threads[i].asked.find(key);
                lanes[i - warp] = found == runtime.threads[i].asked.end() ? nullptr : &found->second;
                if (lanes[i - warp]) some = lanes[i - warp];
            }
            for (size_t n = 0; n < times; ++n) {
                addresses.clear();
                for (int i = 0; i < end - warp; ++i)
                    if (lanes[i] && n < lanes[i]->addresses.size()) addresses.push_back(lanes[i]->addresses[n]);
                Cost cost;
                if (some->global) {
                    cost = sectors(addresses, some->bytes);
                } else {
                    const size_t at_once = some->bytes >= 16 ? 8 : some->bytes >= 8 ? 16 : 32;
                    for (size_t first = 0; first < addresses.size(); first += at_once) {
                        const Cost part =
                            turns(&addresses[first], std::min(at_once, addresses.size() - first), some->bytes);
                        cost.units += part.units;
                        cost.needed += part.needed;
                    }
                }
                add(key, *some, addresses, cost);
            }
        }
    }
}

void forget_counts() {
    counted.clear();
    now = nullptr;
}

std::string counts_json() {
    std::ostringstream out;
    const char* comma = "";
    out << "{";
    for (const auto& [kernel, c] : counted) {
        out << comma << "\"" << kernel << "\": {\"launches\": " << c.launches << ", \"blocks\": " << c.blocks
            << ", \"barriers\": " << c.barriers << ", \"warp_barriers\": " << c.warp_barriers
            << ", \"shuffles\": " << c.shuffles << ", \"matrices\": " << c.matrices << ", \"products\": " << c.products
            << ", \"atomics\": " << c.atomics << ", \"waited\": " << c.waited;
        for (int global = 0; global < 2; ++global)
            for (int write = 0; write < 2; ++write)
                out << ", \"" << (global ? "global" : "shared") << (write ? " write" : " read")
                    << "\": " << traffic_json(c.of[global][write], global ? "sectors" : "turns");
        out << ", \"wasteful\": [";
        const char* between = "";
        for (const auto& [pc, w] : c.wasteful) {
            out << between << "{\"place\": \"" << w.place << "\", \"space\": \"" << (w.global ? "global" : "shared")
                << (w.write ? " write" : " read") << "\", \"width\": " << w.width << ", \"requests\": " << w.requests
                << ", \"units\": " << w.units << ", \"needed\": " << w.needed << "}";
            between = ", ";
        }
        out << "]}";
        comma = ", ";
    }
    out << "}";
    return out.str();
}

}  // namespace simt::host
