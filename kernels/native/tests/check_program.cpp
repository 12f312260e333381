// Programs that are wrong are refused, and what is accepted runs inside its memory (build with a sanitizer).
#include <climits>

#include "check_programs.h"

namespace unetrt::check {
namespace {

constexpr size_t kHeader = 8, kMapWords = 5;
constexpr int kLargest = 64;  // Of the maps that are run.

// Every operator once. scale: 0, or what makes one of its convolutions read bytes.
std::vector<int32_t> make_program(float scale) {
    ProgramBuilder builder({3, 4, 6}, 40);
    const Shape full{12, 4, 6}, wide{36, 4, 6}, half{12, 2, 3};
    const int first = builder.add_map(full), normed = builder.add_map(full), joined = builder.add_map({24, 4, 6});
    const int qkv = builder.add_map(wide), attended = builder.add_map(full), linear = builder.add_map(full);
    const int small = builder.add_map(half), added = builder.add_map(half), end = builder.add_map({2, 4, 6});
    const int bytes = builder.add_map({12, 2, 3, scale, scale > 0 ? 20 : 0}), convolved = builder.add_map(half);
    unetrt_operator conv = make_operator(UNETRT_CONV, first, 0);
    conv.weight = builder.add_weights(12 * 3 * 9);
    conv.kernel = 3;
    conv.stride = conv.pad = 1;
    builder.add(conv);
    unetrt_operator norm = make_operator(UNETRT_NORM, normed, first);
    norm.weight = builder.add_weights(24);
    norm.bias = norm.weight + 12;
    norm.row = 8;
    norm.kind = UNETRT_GROUP;
    norm.groups = 3;
    norm.eps = 1e-5f;
    norm.add = first;
    builder.add(norm);
    builder.add(make_operator(UNETRT_CONCAT, joined, first, normed));
    unetrt_operator project = make_operator(UNETRT_CONV, qkv, joined);
    project.weight = builder.add_weights(36 * 24);
    project.bias = builder.add_weights(36);
    project.kernel = project.stride = 1;
    project.extra[0] = first;
    project.extra_weight = builder.add_weights(36 * 12);
    builder.add(project);
    unetrt_operator attention = make_operator(UNETRT_ATTENTION, attended, qkv);
    attention.heads = 2;
    attention.dim = 6;
    attention.memory = 2;
    attention.weight = builder.add_weights(2 * 2 * 2 * 6);
    attention.scale = 0;
    builder.add(attention);
    unetrt_operator other = make_operator(UNETRT_LINEAR_ATTENTION, linear, qkv);
    other.heads = 3;
    other.dim = 4;
    other.eps = 1;
    builder.add(other);
    unetrt_operator down = make_operator(UNETRT_RESAMPLE, small, linear);
    down.kind = UNETRT_AVERAGE_DOWN;
    builder.add(down);
    builder.add(make_operator(UNETRT_ADD, added, small, small));
    unetrt_operator activated = make_operator(UNETRT_NORM, bytes, added);
    activated.kind = UNETRT_NO_NORM;
    activated.activation = UNETRT_SILU;
    builder.add(activated);
    unetrt_operator middle = make_operator(UNETRT_CONV, convolved, bytes);
    middle.weight = builder.add_weights(12 * 12 * 9);
    middle.kernel = 3;
    middle.stride = middle.pad = 1;
    middle.row = 3;
    middle.extra[0] = small;
    middle.extra_weight = builder.add_weights(12 * 12);
    builder.add(middle);
    const int row = builder.add_map({12, 1, 7}), classified = builder.add_map({12, 1, 7}),
              pixels = builder.add_map(half);
    unetrt_operator tokens = make_operator(UNETRT_TOKENS, row, small);
    tokens.weight = builder.add_weights(12 * 7);
    builder.add(tokens);
    unetrt_operator classify = make_operator(UNETRT_CLASSIFY, classified, row);
    classify.groups = 5;
    classify.weight = builder.add_weights(5 * 12);
    classify.bias = builder.add_weights(5);
    classify.row = 0;
    builder.add(classify);
    builder.add(make_operator(UNETRT_PIXELS, pixels, classified));
    unetrt_operator of_norm = norm;
    of_norm.code = UNETRT_NORM_GRADIENT;
    of_norm.dst = builder.add_map(full);
    of_norm.src[1] = normed;
    of_norm.activation = UNETRT_SILU;
    builder.add(of_norm);
    unetrt_operator of_attention = make_operator(UNETRT_ATTENTION_GRADIENT, builder.add_map(wide), qkv, attended);
    of_attention.heads = 2;
    of_attention.dim = 6;
    builder.add(of_attention);
    unetrt_operator last = make_operator(UNETRT_CONV, end, convolved);
    last.weight = builder.add_weights(2 * 12 * 9);
    last.kernel = 3;
    last.stride = last.pad = 1;
    last.mode = UNETRT_UPSAMPLED;
    builder.add(last);
    return builder.end(end);
}

bool is_small(const std::vector<int32_t>& words) {
    for (size_t i = 0; i < 3 * static_cast<size_t>(words[2]); ++i)
        if (words[kHeader + i / 3 * kMapWords + i % 3] > kLargest) return false;
    return words[7] < 1 << 20 && words[6] < 1 << 16;
}

// Whether the program is accepted; then it must run as well, or say why not.
bool try_program(const std::vector<int32_t>& words, int isa) {
    Network network(unetrt_network_create(words.data(), words.size(), isa));
    if (network == nullptr) {
        expect(unetrt_last_error()[0] != 0, "a refusal says why");
        return false;
    }
    if (!is_small(words)) return true;
    const auto weights = random_floats(static_cast<size_t>(words[7]), 1);
    const Packed packed(unetrt_network_packed_bytes(network.get()));
    expect(unetrt_network_pack(network.get(), weights.data(), weights.size(), packed.data(), packed.bytes()) == 0,
           "the weights of an accepted program are packed");
    Engine engine(unetrt_engine_create(network.get(), packed.data(), packed.bytes(), 1));
    expect(engine != nullptr, "an accepted program has an engine");
    const auto pixels = static_cast<size_t>(kLargest * kLargest);
    const auto x = random_floats(static_cast<size_t>(words[4]) * pixels * 2, 2);
    const auto rows = random_floats(static_cast<size_t>(words[6]) * 2 + 1, 3);
    std::vector<float> out(static_cast<size_t>(words[5]) * pixels * 2 + 2);
    expect(unetrt_engine_run(engine.get(), 2, x.data(), rows.data(), out.data()) == 0, "an accepted program runs");
    return true;
}

void check_every_word(const std::vector<int32_t>& words, int isa) {
    int accepted = 0, tried = 0;
    for (size_t i = 0; i < words.size(); ++i)
        for (const int32_t value : {INT_MIN, -2, -1, 0, 1, 2, 3, 5, 16, 1 << 20, INT_MAX}) {
            if (words[i] == value) continue;
            std::vector<int32_t> changed = words;
            changed[i] = value;
            accepted += try_program(changed, isa);
            ++tried;
        }
    std::printf("instruction set %d: %d of %d changed programs accepted\n", isa, accepted, tried);
    // Many words belong to fields that an operator does not use.
    expect(accepted > 0 && accepted < tried / 4 * 3, "many changed programs are refused");
}

void check_counts(const std::vector<int32_t>& words) {
    expect(unetrt_network_create(nullptr, 0, 0) == nullptr, "no words are refused");
    for (size_t count = 0; count < words.size(); ++count) {
        expect(unetrt_network_create(words.data(), count, 0) == nullptr, "a program that is cut off is refused");
    }
    expect(unetrt_network_create(words.data(), words.size(), 17) == nullptr, "an unknown instruction set is refused");
    Network network(unetrt_network_create(words.data(), words.size(), 0));
    const auto weights = random_floats(static_cast<size_t>(words[7]), 1);
    const Packed packed(unetrt_network_packed_bytes(network.get()));
    const auto few = weights.size() - 1;
    expect(unetrt_network_pack(network.get(), weights.data(), few, packed.data(), packed.bytes()) != 0,
           "too few weights are refused");
    expect(unetrt_network_pack(network.get(), weights.data(), weights.size(), packed.data(), packed.bytes() - 4) != 0,
           "too little room is refused");
    expect(unetrt_network_pack(network.get(), weights.data(), weights.size(), packed.data(), packed.bytes()) == 0,
           "the weights are packed");
    const auto create = [&](const void* data, uint64_t bytes, int threads) {
        return Engine(unetrt_engine_create(network.get(), data, bytes, threads));
    };
    expect(create(packed.data(), packed.bytes() - 4, 1) == nullptr, "packed weights of another size are refused");
    expect(create(static_cast<char*>(packed.data()) + 4, packed.bytes(), 1) == nullptr,
           "unaligned weights are refused");
    expect(create(packed.data(), packed.bytes(), 0) == nullptr, "no threads are refused");
    const Engine engine = create(packed.data(), packed.bytes(), 2);
    std::vector<float> x(3 * 4 * 6), rows(40), out(2 * 4 * 6 + 1);
    const auto run = [&](int batch, const float* in) {
        return unetrt_engine_run(engine.get(), batch, in, rows.data(), out.data());
    };
    expect(run(0, x.data()) != 0 && run(-1, x.data()) != 0 && run(INT_MAX, x.data()) != 0, "such batches are refused");
    expect(run(1, nullptr) != 0, "a run without images is refused");
    std::vector<double> seconds(static_cast<size_t>(words[3]), -1.0);
    const auto profile = [&](double* where, size_t count) {
        return unetrt_engine_profile(engine.get(), 1, x.data(), rows.data(), out.data(), where, count);
    };
    expect(profile(seconds.data(), seconds.size() - 1) != 0 && profile(nullptr, seconds.size()) != 0,
           "a profile without room is refused");
    expect(profile(seconds.data(), seconds.size()) == 0, "a profile succeeds");
    for (const double value : seconds) expect(value > 0 && value < 60, "every operator took its time");
    expect(run(1, x.data()) == 0, "a run succeeds");
}

}  // namespace
}  // namespace unetrt::check

int main() {
    const auto words = unetrt::check::make_program(0), with_bytes = unetrt::check::make_program(0.02f);
    unetrt::check::check_counts(words);
    for (const int isa : unetrt::check::instruction_sets()) {
        unetrt::check::expect(unetrt::check::try_program(words, isa), "the program is accepted");
        const bool has_bytes = unetrt::check::try_program(with_bytes, isa);
        unetrt::check::expect(has_bytes == (isa >= UNETRT_ISA_AVX512_BF16), "bytes are for sets of bf16");
        unetrt::check::check_every_word(has_bytes ? with_bytes : words, isa);
    }
    return unetrt::check::failures == 0 ? 0 : 1;
}
