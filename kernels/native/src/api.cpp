#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "engine.h"
#include "error.h"
#include "isa.h"
#include "layout.h"
#include "pack.h"
#include "program.h"
#include "unetrt_native.h"

struct unetrt_network {
    std::shared_ptr<const unetrt::Layout> layout;
};

struct unetrt_engine {
    unetrt::Engine engine;
};

namespace {

thread_local std::string last_error;

// What `call` returns, or `failed` with the reason kept.
template <typename Result, typename Call>
Result guard(Result failed, Call call) noexcept {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        last_error = "not enough memory; use a smaller batch";
    } catch (const std::exception& error) {
        last_error = error.what();
    }
    return failed;
}

uint64_t packed_bytes(const unetrt::Layout& layout) { return static_cast<uint64_t>(layout.packed) * sizeof(float); }

void require_count(const char* what, uint64_t got, uint64_t expected) {
    if (got == expected) return;
    throw unetrt::Error(std::string(what) + ": got " + std::to_string(got) + ", expected " + std::to_string(expected) +
                        "; they belong to another network");
}

const float* require_packed(const unetrt::Layout& layout, const void* packed, uint64_t bytes) {
    require_count("bytes of packed weights", bytes, packed_bytes(layout));
    const bool is_aligned = reinterpret_cast<uintptr_t>(packed) % 64 == 0;
    if (bytes > 0 && !is_aligned) throw unetrt::Error("packed weights are not 64-byte aligned");
    return static_cast<const float*>(packed);
}

}  // namespace

extern "C" {

const char* unetrt_last_error(void) { return last_error.c_str(); }

int unetrt_best_isa(int precision) { return unetrt::best_isa(precision); }

unetrt_network* unetrt_network_create(const int32_t* words, uint64_t count, int isa) {
    return guard<unetrt_network*>(nullptr, [&] {
        const unetrt::Kernels& kernels = unetrt::kernels_for(isa);
        auto layout =
            std::make_shared<const unetrt::Layout>(unetrt::make_layout(unetrt::read_program(words, count), kernels));
        return new unetrt_network{std::move(layout)};
    });
}

void unetrt_network_destroy(unetrt_network* network) { delete network; }

uint64_t unetrt_network_packed_bytes(const unetrt_network* network) { return packed_bytes(*network->layout); }

int unetrt_network_pack(const unetrt_network* network, const float* weights, uint64_t count, void* packed,
                        uint64_t bytes) {
    return guard(1, [&] {
        require_count("weights", count, static_cast<uint64_t>(network->layout->weights));
        require_count("bytes of packed weights", bytes, packed_bytes(*network->layout));
        unetrt::pack_weights(*network->layout, weights, static_cast<float*>(packed));
        return 0;
    });
}

unetrt_engine* unetrt_engine_create(const unetrt_network* network, const void* packed, uint64_t bytes, int threads) {
    return guard<unetrt_engine*>(nullptr, [&] {
        const float* weights = require_packed(*network->layout, packed, bytes);
        if (threads < 1 || threads > 1024) {
            throw unetrt::Error("threads are " + std::to_string(threads) + "; expected 1 to 1024");
        }
        return new unetrt_engine{{network->layout, weights, std::make_shared<unetrt::Pool>(threads)}};
    });
}

unetrt_engine* unetrt_engine_create_beside(const unetrt_network* network, const void* packed, uint64_t bytes,
                                           const unetrt_engine* other) {
    return guard<unetrt_engine*>(nullptr, [&] {
        const float* weights = require_packed(*network->layout, packed, bytes);
        return new unetrt_engine{{network->layout, weights, other->engine.pool()}};
    });
}

void unetrt_engine_destroy(unetrt_engine* engine) { delete engine; }

int unetrt_engine_run(unetrt_engine* engine, int batch, const float* x, const float* rows, float* out) {
    return guard(1, [&] {
        engine->engine.run(batch, x, rows, out, nullptr);
        return 0;
    });
}

int unetrt_engine_profile(unetrt_engine* engine, int batch, const float* x, const float* rows, float* out,
                          double* seconds, uint64_t operators) {
    return guard(1, [&] {
        require_count("operators", operators, static_cast<uint64_t>(engine->engine.operators()));
        if (seconds == nullptr) throw unetrt::Error("seconds is NULL; give room for every operator");
        engine->engine.run(batch, x, rows, out, seconds);
        return 0;
    });
}
}
