// Whole programs through the C interface, against plain loops in double precision; the same bits whatever the batch, the
// threads and the callers.
#include <cmath>
#include <thread>

#include "check_programs.h"

namespace unetrt::check {
namespace {

constexpr int kRows = 24;

struct Image {
    Shape shape;
    std::vector<double> values;

    explicit Image(Shape s) : shape(s), values(static_cast<size_t>(s.channels * s.height * s.width)) {}
    double& at(int c, int y, int x) { return values[static_cast<size_t>((c * shape.height + y) * shape.width + x)]; }
    double get(int c, int y, int x) {
        return y < 0 || x < 0 || y >= shape.height || x >= shape.width ? 0.0 : at(c, y, x);
    }
};

// Of the convolutions that the program below has.
enum class Kind { kPlain, kStrided, kUpsampled, kTransposed };

double convolve_pixel(Image& in, const float* w, Kind kind, int out_channels, int o, int y, int x) {
    const int channels = in.shape.channels, k = kind == Kind::kTransposed ? 4 : 3;
    double total = 0;
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < k; ++i)
            for (int j = 0; j < k; ++j) {
                const auto weight = static_cast<size_t>(((o * channels + c) * k + i) * k + j);
                const auto transposed = static_cast<size_t>(((c * out_channels + o) * k + i) * k + j);
                const int yy = y + i - 1, xx = x + j - 1;
                switch (kind) {
                    case Kind::kPlain: total += in.get(c, yy, xx) * static_cast<double>(w[weight]); break;
                    case Kind::kStrided:
                        total += in.get(c, 2 * y + i - 1, 2 * x + j - 1) * static_cast<double>(w[weight]);
                        break;
                    case Kind::kUpsampled:
                        if (yy >= 0 && xx >= 0) total += in.get(c, yy / 2, xx / 2) * static_cast<double>(w[weight]);
                        break;
                    case Kind::kTransposed:
                        if ((y + 1 - i) % 2 == 0 && (x + 1 - j) % 2 == 0) {
                            total += in.get(c, (y + 1 - i) / 2, (x + 1 - j) / 2) * static_cast<double>(w[transposed]);
                        }
                        break;
                }
            }
    return total;
}

struct Layer {
    Kind kind;
    Shape out;
    int32_t weight, bias, row;
};

Image convolve(Image& in, const Layer& layer, const std::vector<float>& weights, const float* rows) {
    Image out(layer.out);
    for (int o = 0; o < layer.out.channels; ++o)
        for (int y = 0; y < layer.out.height; ++y)
            for (int x = 0; x < layer.out.width; ++x) {
                const float* w = weights.data() + layer.weight;
                double value = convolve_pixel(in, w, layer.kind, layer.out.channels, o, y, x);
                value += static_cast<double>(weights[static_cast<size_t>(layer.bias + o)]);
                if (layer.row != -1) value += static_cast<double>(rows[layer.row + o]);
                out.at(o, y, x) = value;
            }
    return out;
}

void normalise(Image& image, int groups, const float* weight, const float* bias) {
    const int size = image.shape.channels / groups, pixels = image.shape.height * image.shape.width;
    for (int g = 0; g < groups; ++g) {
        double mean = 0, variance = 0;
        for (int i = g * size * pixels; i < (g + 1) * size * pixels; ++i) mean += image.values[static_cast<size_t>(i)];
        mean /= size * pixels;
        for (int i = g * size * pixels; i < (g + 1) * size * pixels; ++i) {
            const double d = image.values[static_cast<size_t>(i)] - mean;
            variance += d * d;
        }
        const double factor = 1 / std::sqrt(variance / (size * pixels) + 1e-5);
        for (int i = g * size * pixels; i < (g + 1) * size * pixels; ++i) {
            const int c = i / pixels;
            double& value = image.values[static_cast<size_t>(i)];
            value = (value - mean) * factor * static_cast<double>(weight[c]) + static_cast<double>(bias[c]);
            value /= 1 + std::exp(-value);
        }
    }
}

// Every kind of convolution with a norm behind each, on channels that are no multiples of 16 and an odd width.
struct Chain {
    std::vector<int32_t> words;
    std::vector<Layer> layers;
    std::vector<int32_t> norms;
    int32_t weights;
    Shape in{3, 6, 10};
};

Chain make_chain() {
    Chain chain;
    ProgramBuilder builder(chain.in, kRows);
    int map = 0, channels = chain.in.channels;
    const auto add = [&](Kind kind, Shape out, int row) {
        const int k = kind == Kind::kTransposed ? 4 : 3;
        const Layer layer{kind, out, builder.add_weights(channels * out.channels * k * k),
                          builder.add_weights(out.channels), row};
        chain.layers.push_back(layer);
        const int convolved = builder.add_map(out), normalised = builder.add_map(out);
        unetrt_operator conv = make_operator(UNETRT_CONV, convolved, map);
        conv.weight = layer.weight;
        conv.bias = layer.bias;
        conv.row = row;
        conv.kernel = k;
        conv.pad = 1;
        conv.stride = kind == Kind::kStrided || kind == Kind::kTransposed ? 2 : 1;
        conv.mode = kind == Kind::kUpsampled    ? UNETRT_UPSAMPLED
                    : kind == Kind::kTransposed ? UNETRT_TRANSPOSED
                                                : UNETRT_PLAIN;
        builder.add(conv);
        unetrt_operator norm = make_operator(UNETRT_NORM, normalised, convolved);
        chain.norms.push_back(builder.add_weights(2 * out.channels));
        norm.weight = chain.norms.back();
        norm.bias = norm.weight + out.channels;
        norm.kind = UNETRT_GROUP;
        norm.groups = 4;
        norm.activation = UNETRT_SILU;
        norm.eps = 1e-5f;
        builder.add(norm);
        map = normalised;
        channels = out.channels;
    };
    add(Kind::kPlain, {24, 6, 10}, 0);
    add(Kind::kStrided, {40, 3, 5}, -1);
    add(Kind::kUpsampled, {20, 6, 10}, 4);
    add(Kind::kTransposed, {36, 12, 20}, -1);
    add(Kind::kPlain, {4, 12, 20}, 20);
    chain.weights = builder.weights();
    chain.words = builder.end(map);
    return chain;
}

std::vector<double> run_plainly(const Chain& chain, const std::vector<float>& weights, const float* x,
                                const float* rows) {
    Image image(chain.in);
    for (size_t i = 0; i < image.values.size(); ++i) image.values[i] = static_cast<double>(x[i]);
    for (size_t i = 0; i < chain.layers.size(); ++i) {
        image = convolve(image, chain.layers[i], weights, rows);
        const float* norm = weights.data() + chain.norms[i];
        normalise(image, 4, norm, norm + image.shape.channels);
    }
    return image.values;
}

struct Fixture {
    Chain chain = make_chain();
    std::vector<float> weights = random_floats(static_cast<size_t>(chain.weights), 1, 0.2f);
    int images = 5;
    size_t in_floats = 3 * 6 * 10, out_floats = 4 * 12 * 20;
    std::vector<float> x = random_floats(5 * in_floats, 2), rows = random_floats(5 * kRows, 3);

    std::vector<float> run(unetrt_engine* engine, int first, int count) const {
        std::vector<float> out(static_cast<size_t>(count) * out_floats, NAN);
        const int status = unetrt_engine_run(engine, count, x.data() + static_cast<size_t>(first) * in_floats,
                                             rows.data() + first * kRows, out.data());
        expect(status == 0, "a run succeeds");
        return out;
    }
};

void check_isa(const Fixture& fixture, int isa) {
    const auto words = fixture.chain.words;
    Network network(unetrt_network_create(words.data(), words.size(), isa));
    expect(network != nullptr, "the program is accepted");
    if (network == nullptr) return;
    const Packed packed(unetrt_network_packed_bytes(network.get()));
    expect(unetrt_network_pack(network.get(), fixture.weights.data(), fixture.weights.size(), packed.data(),
                               packed.bytes()) == 0,
           "the weights are packed");
    Engine one(unetrt_engine_create(network.get(), packed.data(), packed.bytes(), 1));
    Engine three(unetrt_engine_create(network.get(), packed.data(), packed.bytes(), 3));
    network.reset();
    const std::vector<float> all = fixture.run(three.get(), 0, fixture.images);
    double worst = 0;
    for (int n = 0; n < fixture.images; ++n) {
        const float* x = fixture.x.data() + static_cast<size_t>(n) * fixture.in_floats;
        const auto expected = run_plainly(fixture.chain, fixture.weights, x, fixture.rows.data() + n * kRows);
        const float* got = all.data() + static_cast<size_t>(n) * fixture.out_floats;
        for (size_t i = 0; i < expected.size(); ++i)
            worst = std::max(worst, std::abs(expected[i] - static_cast<double>(got[i])));
        const auto alone = fixture.run(one.get(), n, 1);
        expect(std::memcmp(alone.data(), got, alone.size() * sizeof(float)) == 0, "an image has the same bits alone");
    }
    std::printf("instruction set %d: largest error %.2g\n", isa, worst);
    // Ten roundings of 2^-8 behind one another, of values that the norms keep at about 1.
    expect(worst < (isa < UNETRT_ISA_AVX512_BF16 ? 1e-4 : 1e-1), "the outputs are those of plain loops");

    // Callers at once, with batches of their own, on the same engine.
    std::vector<std::thread> callers;
    std::vector<int> same(4, 0);
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&, caller] {
            for (int i = 0; i < 5; ++i) {
                const int first = (caller + i) % 4, count = 1 + (caller + i) % 2;
                const auto out = fixture.run(caller % 2 == 0 ? three.get() : one.get(), first, count);
                const float* expected = all.data() + static_cast<size_t>(first) * fixture.out_floats;
                same[static_cast<size_t>(caller)] += std::memcmp(out.data(), expected, out.size() * sizeof(float)) == 0;
            }
        });
    for (std::thread& caller : callers) caller.join();
    for (const int count : same) expect(count == 5, "calls from several threads give the same bits");
}

}  // namespace
}  // namespace unetrt::check

int main() {
    const unetrt::check::Fixture fixture;
    for (const int isa : unetrt::check::instruction_sets()) unetrt::check::check_isa(fixture, isa);
    return unetrt::check::failures == 0 ? 0 : 1;
}
