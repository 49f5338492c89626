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

// Puts the different ones first, in order, and says how many they are. Most requests come in order.
size_t different(std::vector<uintptr_t>& numbers) {
    if (!std::is_sorted(numbers.begin(), numbers.end())) std::sort(numbers.begin(), numbers.end());
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

void add(const Asked& asked, size_t lanes, Cost cost) {
    Traffic& traffic = now->of[asked.global][asked.by.write];
    ++traffic.requests;
    traffic.bytes += lanes * asked.bytes;
    traffic.by_width[log_of(asked.bytes)] += lanes * asked.bytes;
    traffic.units += cost.units;
    traffic.needed += cost.needed;
    if (cost.units == cost.needed && !now->wasteful.count(asked.by)) return;
    Where& where = now->wasteful[asked.by];
    if (where.place.empty())
        where = {asked.place.file ? name_of(asked.place) : line_of(asked.by.pc), asked.global, asked.by.write,
                 asked.bytes};
    ++where.requests;
    where.units += cost.units;
    where.needed += cost.needed;
}

// What the lanes of a warp asked by an instruction the nth time.
void add_nth(const std::vector<const Asked*>& lanes, size_t n) {
    static std::vector<uintptr_t> addresses;
    addresses.clear();
    for (const Asked* asked : lanes)
        if (n < asked->addresses.size()) addresses.push_back(asked->addresses[n]);
    const Asked& some = *lanes.front();
    if (some.global) return add(some, addresses.size(), sectors(addresses, some.bytes));
    const size_t at_once = some.bytes >= 16 ? 8 : some.bytes >= 8 ? 16 : 32;
    Cost cost;
    for (size_t first = 0; first < addresses.size(); first += at_once) {
        const Cost part = turns(&addresses[first], std::min(at_once, addresses.size() - first), some.bytes);
        cost.units += part.units;
        cost.needed += part.needed;
    }
    add(some, addresses.size(), cost);
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
    if (p >= stack && p < stack + kStack) return;
    const auto arena = reinterpret_cast<uintptr_t>(shared_arena());
    const bool global = p < arena || p >= arena + kArena;
    const Instruction by{pc, place.line, write};
    const size_t known = thread.asked.size();
    size_t at = thread.asked_last, tried = 0;
    while (tried < known && !(thread.asked[at = at + 1 < known ? at + 1 : 0].by == by)) ++tried;
    if (tried == known) {
        at = known;
        thread.asked.push_back({by, place, std::min<size_t>(bytes, 16), global, !write && is_constant(p), {}});
    }
    thread.asked_last = at;
    if (thread.asked[at].constant) return;
    thread.asked[at].addresses.push_back(p);
    if (global && !write && waits) now->waited += bytes;
}

void count_matrix(const void* const* rows, Place place) {
    uintptr_t addresses[8];
    for (int i = 0; i < 8; ++i) addresses[i] = reinterpret_cast<uintptr_t>(rows[i]);
    add({{place.file, place.line, false}, place, 16, false, false, {}}, 8, turns(addresses, 8, 16));
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
        std::map<Instruction, std::vector<const Asked*>> instructions;  // with the lanes that executed it
        for (int i = warp; i < end; ++i)
            for (const Asked& asked : runtime.threads[i].asked) instructions[asked.by].push_back(&asked);
        for (const auto& [by, lanes] : instructions) {
            size_t times = 0;
            for (const Asked* asked : lanes) times = std::max(times, asked->addresses.size());
            for (size_t n = 0; n < times; ++n) add_nth(lanes, n);
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
