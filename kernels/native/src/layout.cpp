#include "layout.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace unetrt {
namespace {

// Pixels that a tap of stride 1 of a convolution reaches beyond its map: up and left, down and right.
int32_t reach(int32_t offset, int32_t out, int32_t in) { return std::max(-offset, out - 1 + offset - (in - 1)); }

int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

int32_t halve_down(int32_t value) { return value >= 0 ? value / 2 : (value - 1) / 2; }

class LayoutMaker {
  public:
    LayoutMaker(const Program& program, const Kernels& kernels) : program_(program), kernels_(kernels) {
        layout_.kernels = &kernels;
        layout_.in_channels = program.in_channels;
        layout_.out_channels = program.out_channels;
        layout_.row_width = program.row_width;
        layout_.weights = program.weights;
        for (const MapShape& map : program.maps) {
            new_map(map.channels, map.height, map.width);
            layout_.maps.back().scale = map.scale;
            layout_.maps.back().zero = map.zero;
            if (!map.has_bytes()) continue;
            if (!kernels.takes_pairs)
                throw Error(std::string("instruction set ") + kernels.name + " has no bytes; take bf16");
            layout_.maps.back().block = kBytesBlock;
        }
    }

    Layout make() {
        for (const unetrt_operator& op : program_.operators) {
            lower(op);
            layout_.operators.resize(layout_.steps.size(), layout_.operator_count++);
        }
        for (PlacedMap& map : layout_.maps) {
            const int64_t cells = static_cast<int64_t>(map.height + 2 * map.border) * (map.width + 2 * map.border);
            map.size = cells * divide_up(map.channels, map.block);
        }
        layout_.arena = place_maps(layout_.maps);
        return std::move(layout_);
    }

  private:
    void lower(const unetrt_operator& op) {
        switch (op.code) {
            case UNETRT_INPUT: return lower_planar(op.dst, true);
            case UNETRT_OUTPUT: return lower_planar(op.src[0], false);
            case UNETRT_CONV: return lower_conv(op);
            case UNETRT_NORM: return lower_norm(op);
            case UNETRT_ATTENTION:
            case UNETRT_LINEAR_ATTENTION: return lower_attention(op);
            case UNETRT_RESAMPLE: return lower_resample(op);
            case UNETRT_ADD: return add_copy({{op.src[0], -1}, op.dst, op.src[1], op.scale, false});
            case UNETRT_TOKENS: return lower_tokens(op, op.src[0], op.dst);
            case UNETRT_PIXELS: return lower_tokens(op, op.dst, op.src[0]);
            case UNETRT_CLASSIFY: return lower_classify(op);
            case UNETRT_NORM_GRADIENT: return lower_norm_gradient(op);
            case UNETRT_ATTENTION_GRADIENT: return lower_attention_gradient(op);
            case UNETRT_CONCAT: return add_copy({{op.src[0], op.src[1]}, op.dst, -1, 1.0f, false});
        }
    }

    int32_t pad_channels(int32_t channels) const { return round_up(channels, kernels_.block); }

    int32_t count_channels(const int32_t (&maps)[2]) {
        return map(maps[0]).channels + (maps[1] == -1 ? 0 : map(maps[1]).channels);
    }

    PlacedMap& map(int32_t index) { return layout_.maps[static_cast<size_t>(index)]; }

    void read(int32_t index) {
        if (index != -1) map(index).last = static_cast<int32_t>(layout_.steps.size());
    }

    void write(int32_t index) {
        const auto step = static_cast<int32_t>(layout_.steps.size());
        if (map(index).first == -1) map(index).first = step;
        map(index).last = step;
    }

    void use(std::initializer_list<int32_t> sources, int32_t dst) {
        for (const int32_t source : sources) read(source);
        write(dst);
    }

    int32_t new_map(int32_t channels, int32_t height, int32_t width) {
        layout_.maps.push_back({channels, height, width, 0, 0, 0, kernels_.block, 0, 0, -1, -1, -1});
        return static_cast<int32_t>(layout_.maps.size()) - 1;
    }

    int64_t reserve(int64_t floats) {
        const int64_t place = layout_.packed;
        layout_.packed += (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
        return place;
    }

    int64_t pack_vector(int32_t place, int32_t count) {
        if (place == -1) return -1;
        const int64_t packed = reserve(pad_channels(count));
        layout_.vectors.push_back({packed, place, count, pad_channels(count)});
        return packed;
    }

    int64_t pad_row(int32_t column, int32_t count, int32_t parts) {
        if (column == -1) return -1;
        const int64_t padded = layout_.padded_rows;
        for (int32_t i = 0; i < parts; ++i) {
            layout_.rows.push_back({column + i * count, count, layout_.padded_rows});
            layout_.padded_rows += pad_channels(count);
        }
        return padded;
    }

    void lower_planar(int32_t index, bool is_input) {
        if (is_input) {
            write(index);
        } else {
            read(index);
            layout_.output_floats = int64_t{map(index).channels} * map(index).height * map(index).width;
        }
        layout_.steps.push_back(PlanarStep{index, is_input});
    }

    void add_copy(CopyStep step) {
        use({step.src[0], step.src[1], step.add}, step.dst);
        layout_.steps.push_back(step);
    }

    // Both sources as one map, unless the kernels can read them as two.
    void join_uneven(int32_t (&sources)[2]) {
        if (sources[1] == -1 || map(sources[0]).channels % kernels_.block == 0) return;
        const PlacedMap first = map(sources[0]);
        const int32_t joined = new_map(first.channels + map(sources[1]).channels, first.height, first.width);
        add_copy({{sources[0], sources[1]}, joined, -1, 1.0f, false});
        sources[0] = joined;
        sources[1] = -1;
    }

    // By the convolution that writes the map whole, or by a step of its own.
    void measure(int32_t index) {
        if (index == -1 || map(index).statistics != -1) return;
        PlacedMap& measured = map(index);
        measured.statistics = layout_.statistics;
        layout_.statistics += int64_t{2} * measured.height * pad_channels(measured.channels);
        auto* conv = std::get_if<ConvStep>(&layout_.steps[static_cast<size_t>(measured.first)]);
        if (conv != nullptr && conv->step == 1) {
            conv->measures = true;
        } else {
            read(index);
            layout_.steps.push_back(MeasureStep{index});
        }
    }

    void lower_norm(const unetrt_operator& op) {
        NormStep step = start_norm(op);
        join_uneven(step.src);
        if (op.kind == UNETRT_GROUP) {
            measure(step.src[0]);
            measure(step.src[1]);
        }
        use({step.src[0], step.src[1], step.add}, step.dst);
        layout_.steps.push_back(step);
    }

    NormStep start_norm(const unetrt_operator& op) {
        const int32_t channels = map(op.dst).channels;
        NormStep step{{op.src[0], op.src[1]}, op.dst, op.add, op.scale, op.eps, op.kind, op.groups,
                      op.activation,          -1,     -1,     -1};
        step.weight = op.kind == UNETRT_NO_NORM ? -1 : pack_vector(op.weight, channels);
        step.bias = pack_vector(op.bias, channels);
        step.row = pad_row(op.row, channels, 2);
        return step;
    }

    void lower_norm_gradient(const unetrt_operator& op) {
        NormStep norm = start_norm(op);
        norm.src[1] = -1;
        measure(op.src[0]);
        use({op.src[0], op.src[1], op.add}, op.dst);
        layout_.steps.push_back(NormGradientStep{norm, op.src[1]});
    }

    void lower_attention_gradient(const unetrt_operator& op) {
        use({op.src[0], op.src[1]}, op.dst);
        layout_.steps.push_back(AttentionGradientStep{op.src[0], op.src[1], op.dst, op.heads, op.dim});
    }

    void lower_tokens(const unetrt_operator& op, int32_t pixels, int32_t tokens) {
        TokensStep step{pixels, tokens, -1, op.code == UNETRT_PIXELS};
        const bool has_learned = !step.is_gradient && op.weight != -1;
        if (has_learned) step.learned = pack_vector(op.weight, map(tokens).channels * map(tokens).width);
        use({op.src[0]}, op.dst);
        layout_.steps.push_back(step);
    }

    void lower_classify(const unetrt_operator& op) {
        ClassifyStep step{op.src[0], op.dst, op.groups, 0, 0, 0};
        step.weight = pack_vector(op.weight, op.groups * map(op.src[0]).channels);
        step.bias = pack_vector(op.bias, op.groups);
        step.row = pad_row(op.row, 2, 1);
        use({op.src[0]}, op.dst);
        layout_.steps.push_back(step);
    }

    void lower_attention(const unetrt_operator& op) {
        const int32_t floats = 2 * op.heads * op.memory * op.dim;
        const int64_t learned = op.memory > 0 ? pack_vector(op.weight, floats) : -1;
        const bool is_linear = op.code == UNETRT_LINEAR_ATTENTION;
        use({op.src[0]}, op.dst);
        layout_.steps.push_back(
            AttentionStep{is_linear, op.src[0], op.dst, op.heads, op.dim, op.memory, op.scale, op.eps, learned});
    }

    void lower_resample(const unetrt_operator& op) {
        use({op.src[0], op.add}, op.dst);
        layout_.steps.push_back(ResampleStep{op.src[0], op.dst, op.add, op.kind, op.pad, op.scale});
    }

    void lower_conv(const unetrt_operator& op) {
        if (map(op.src[0]).scale > 0 && op.extra[0] != -1) return lower_extra(op);
        if (op.mode == UNETRT_PLAIN) {
            ConvStep step = start_conv(op, 1, 0, 0);
            if (op.stride == 1) {
                add_plain_taps(op, step);
            } else {
                add_strided_taps(op, step);
            }
            return add_conv(std::move(step));
        }
        const int64_t bias = pack_biases(op), row = pad_row(op.row, map(op.dst).channels, 1);
        for (int32_t phase = 0; phase < 4; ++phase) {
            ConvStep step = start_conv(op, 2, phase / 2, phase % 2);
            step.bias = bias;
            step.row = row;
            if (op.mode == UNETRT_UPSAMPLED) {
                add_upsampled_taps(op, step);
            } else {
                add_transposed_taps(op, step);
            }
            add_conv(std::move(step));
        }
    }

    // A convolution of bytes whose sum goes on with one of numbers: the latter first, as what is added.
    void lower_extra(unetrt_operator op) {
        const PlacedMap dst = map(op.dst);
        unetrt_operator extra = op;
        extra.dst = new_map(dst.channels, dst.height, dst.width);
        std::copy(op.extra, op.extra + 2, extra.src);
        extra.weight = op.extra_weight;
        extra.bias = op.extra_bias;
        extra.kernel = 1;
        extra.pad = 0;
        extra.row = extra.extra[0] = extra.extra[1] = -1;
        extra.scale = 1;
        lower_conv(extra);
        op.add = extra.dst;
        op.extra[0] = op.extra[1] = -1;
        lower_conv(op);
    }

    int64_t pack_biases(const unetrt_operator& op) {
        const int32_t channels = map(op.dst).channels;
        const int64_t packed = reserve(pad_channels(channels));
        layout_.vectors.push_back({packed, op.bias, op.bias == -1 ? 0 : channels, pad_channels(channels)});
        if (op.extra_bias != -1 && op.extra[0] != -1) {
            layout_.vectors.push_back({packed, op.extra_bias, channels, pad_channels(channels)});
        }
        return packed;
    }

    ConvStep start_conv(const unetrt_operator& op, int32_t step, int32_t y0, int32_t x0) {
        const PlacedMap& dst = map(op.dst);
        ConvStep conv{};
        conv.dst = op.dst;
        conv.height = dst.height / step;
        conv.width = dst.width / step;
        conv.step = step;
        conv.y0 = y0;
        conv.x0 = x0;
        conv.add = op.add;
        conv.scale = op.scale;
        conv.out_channels = dst.channels;
        conv.clears_border = y0 == 0 && x0 == 0;
        conv.offsets = conv.factors = -1;
        if (step == 1) {
            conv.bias = pack_biases(op);
            conv.row = pad_row(op.row, dst.channels, 1);
        }
        return conv;
    }

    // One tap for each source, which share the kernel's pixel.
    void add_taps(const int32_t (&sources)[2], int32_t dy, int32_t dx, TapWeights weights, ConvStep& step) {
        for (const int32_t source : sources) {
            if (source == -1) continue;
            step.taps.push_back({source, 0, map(source).channels, dy, dx, weights});
            for (int32_t i = 0; i < weights.count; ++i) weights.place[i] += map(source).channels * weights.in_stride;
        }
    }

    void add_plain_taps(const unetrt_operator& op, ConvStep& step) {
        const int32_t k = op.kernel, in = count_channels(op.src);
        for (int32_t i = 0; i < k * k; ++i) {
            const TapWeights weights{{op.weight + i, 0, 0, 0}, 1, static_cast<int64_t>(in) * k * k, k * k};
            add_taps(op.src, i / k - op.pad, i % k - op.pad, weights, step);
        }
        if (op.extra[0] == -1) return;
        const int32_t extra = count_channels(op.extra);
        add_taps(op.extra, 0, 0, {{op.extra_weight, 0, 0, 0}, 1, extra, 1}, step);
    }

    // The source's pixels by the parity of their row and column, so that every tap has stride 1.
    void add_strided_taps(const unetrt_operator& op, ConvStep& step) {
        const int32_t k = op.kernel, in = count_channels(op.src);
        for (const int32_t source : op.src) {
            if (source == -1) continue;
            const PlacedMap shape = map(source);
            const int32_t padded = pad_channels(shape.channels);
            const int32_t phases = new_map(4 * padded, (shape.height + 1) / 2, (shape.width + 1) / 2);
            add_copy({{source, -1}, phases, -1, 1.0f, true});
            const int32_t first = source == op.src[0] ? 0 : map(op.src[0]).channels;
            for (int32_t i = 0; i < k * k; ++i) {
                const int32_t y = i / k - op.pad, x = i % k - op.pad;
                const int32_t phase = 2 * (y & 1) + (x & 1);
                const TapWeights weights{{op.weight + static_cast<int64_t>(first) * k * k + i, 0, 0, 0},
                                         1,
                                         static_cast<int64_t>(in) * k * k,
                                         k * k};
                step.taps.push_back(
                    {phases, phase * padded / kernels_.block, shape.channels, halve_down(y), halve_down(x), weights});
            }
        }
    }

    // Pixel 2 y + phase of the repeated map is pixel y + halve_down(phase + k - 1) of the map for row k of the kernel, so
    // that three rows meet two.
    void add_upsampled_taps(const unetrt_operator& op, ConvStep& step) {
        const int32_t in = count_channels(op.src);
        for (int32_t dy = -1; dy <= 1; ++dy)
            for (int32_t dx = -1; dx <= 1; ++dx) {
                TapWeights weights{{0, 0, 0, 0}, 0, static_cast<int64_t>(in) * 9, 9};
                for (int32_t i = 0; i < 9; ++i) {
                    const bool meets = halve_down(step.y0 + i / 3 - 1) == dy && halve_down(step.x0 + i % 3 - 1) == dx;
                    if (meets) weights.place[weights.count++] = op.weight + i;
                }
                if (weights.count > 0) add_taps(op.src, dy, dx, weights, step);
            }
    }

    // out[o] sums in[i] w[k] over o = 2 i - 1 + k.
    void add_transposed_taps(const unetrt_operator& op, ConvStep& step) {
        const int32_t out = map(op.dst).channels;
        for (int32_t i = 0; i < 16; ++i) {
            const int32_t y = step.y0 + 1 - i / 4, x = step.x0 + 1 - i % 4;
            if (y % 2 != 0 || x % 2 != 0) continue;
            add_taps(op.src, y / 2, x / 2, {{op.weight + i, 0, 0, 0}, 1, 16, static_cast<int64_t>(out) * 16}, step);
        }
    }

    void add_conv(ConvStep step) {
        int64_t inputs = 0;
        int32_t most = 0;
        const bool has_bytes = map(step.taps.front().map).scale > 0;
        for (const Tap& tap : step.taps) {
            const PlacedMap& source = map(tap.map);
            read(tap.map);
            most = std::max({most, reach(tap.dy, step.height, source.height), reach(tap.dx, step.width, source.width)});
            inputs += kernels_.takes_pairs ? round_up(tap.channels, source.block) : tap.channels;
        }
        // One border for all, so that rows of all sources are as far apart.
        for (const Tap& tap : step.taps) map(tap.map).border = std::max(map(tap.map).border, most);
        use({step.add}, step.dst);
        const int64_t bytes = has_bytes ? 1 : kernels_.takes_pairs ? 2 : 4;
        step.panel_floats = inputs * kernels_.panel * bytes / 4;
        step.weights = reserve(inputs * pad_channels(step.out_channels) * bytes / 4);
        if (has_bytes) {
            step.offsets = reserve(pad_channels(step.out_channels));
            step.factors = reserve(pad_channels(step.out_channels));
        }
        layout_.steps.push_back(std::move(step));
    }

    const Program& program_;
    const Kernels& kernels_;
    Layout layout_{};
};

}  // namespace

Layout make_layout(const Program& program, const Kernels& kernels) { return LayoutMaker(program, kernels).make(); }

}  // namespace unetrt
