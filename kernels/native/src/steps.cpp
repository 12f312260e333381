#include "steps.h"

#include <algorithm>
#include <set>

namespace unetrt {

namespace {

// Of a core's second-level cache, for the rows that one piece of a convolution reads.
constexpr int64_t kPieceBytes = 256 * 1024;
constexpr int32_t kItemsAThread = 8;

class Binder {
  public:
    Binder(const Layout& layout, int32_t batch, int threads, const Places& places)
        : layout_(layout), kernels_(*layout.kernels), batch_(batch), threads_(threads), places_(places) {}

    Bound bind() {
        for (size_t i = 0; i < layout_.steps.size(); ++i) {
            std::visit([this](const auto& step) { add(step); }, layout_.steps[i]);
            bound_.operators.resize(bound_.tasks.size(), layout_.operators[i]);
        }
        return std::move(bound_);
    }

    // The same without places: what the steps ask for.
    Memory measure() {
        for (const Step& step : layout_.steps) {
            if (const auto* norm = std::get_if<NormStep>(&step)) {
                shared_ = std::max(shared_, kernels_.norm_workspace(norm_args(*norm)));
            } else if (const auto* attention = std::get_if<AttentionStep>(&step)) {
                const AttentionArgs args = attention_args(*attention);
                const auto workspace = attention->is_linear ? kernels_.linear_workspace : kernels_.attention_workspace;
                const auto scratch = attention->is_linear ? kernels_.linear_scratch : kernels_.attention_scratch;
                shared_ = std::max(shared_, workspace(args));
                scratch_ = std::max(scratch_, scratch(args));
            } else if (const auto* of_norm = std::get_if<NormGradientStep>(&step)) {
                shared_ = std::max(
                    shared_, kernels_.norm_gradient_workspace({norm_args(of_norm->norm), map(of_norm->gradient)}));
            } else if (const auto* of_attention = std::get_if<AttentionGradientStep>(&step)) {
                scratch_ =
                    std::max(scratch_, kernels_.attention_gradient_scratch(attention_gradient_args(*of_attention)));
            } else if (const auto* classify = std::get_if<ClassifyStep>(&step)) {
                scratch_ = std::max(scratch_, kernels_.classify_scratch(classify_args(*classify)));
            }
        }
        return {(layout_.arena * batch_ + kSlackLines) * kLineFloats, layout_.padded_rows * batch_,
                layout_.statistics * batch_, shared_, scratch_};
    }

  private:
    Map map(int32_t index) const {
        if (index == -1) return Map{};
        const PlacedMap& m = layout_.maps[static_cast<size_t>(index)];
        float* data = places_.maps == nullptr ? nullptr : places_.maps + m.offset * batch_ * kLineFloats;
        return {data, m.channels, m.height, m.width, m.border, batch_, m.block};
    }

    Maps maps(const int32_t (&indices)[2]) const {
        return {{map(indices[0]), map(indices[1])}, indices[1] == -1 ? 1 : 2};
    }

    const float* packed(int64_t place) const {
        return place == -1 || places_.packed == nullptr ? nullptr : places_.packed + place;
    }

    const float* rows(int64_t place) const {
        return place == -1 || places_.rows == nullptr ? nullptr : places_.rows + place;
    }

    float* statistics(int32_t map) const {
        if (map == -1 || places_.statistics == nullptr) return nullptr;
        return places_.statistics + layout_.maps[static_cast<size_t>(map)].statistics * batch_;
    }

    template <typename Args>
    void add_task(int items, void (*kernel)(const Args&, int), const Args& args) {
        if (items > 0) bound_.tasks.push_back({items, [=](int item, float*) { kernel(args, item); }});
    }

    // The order of the taps is the order of the packed weights.
    const std::vector<Segment>& add_segments(const ConvStep& step) {
        auto segments = std::make_unique<std::vector<Segment>>();
        for (const Tap& tap : step.taps) {
            const Map source = map(tap.map);
            const int32_t blocks = round_up(tap.channels, source.block) / source.block;
            const int32_t last = tap.channels - (blocks - 1) * source.block;
            segments->push_back({source.at(tap.block, tap.dy, tap.dx), source.plane(), source.row(), blocks, last});
        }
        bound_.segments.push_back(std::move(segments));
        return *bound_.segments.back();
    }

    // Few enough rows for the cache, and enough pieces for all threads.
    int32_t choose_piece_rows(const ConvStep& step, int32_t panels) const {
        std::set<int32_t> sources;
        int64_t row_bytes = 0;
        for (const Tap& tap : step.taps) {
            if (!sources.insert(tap.map).second) continue;
            const Map source = map(tap.map);
            row_bytes += source.row() * source.blocks() * kLineBytes;
        }
        const int64_t most = std::max<int64_t>(1, kPieceBytes / row_bytes - 2);
        const int32_t by_cache = static_cast<int32_t>((step.height + most - 1) / most);
        const int32_t by_threads = (kItemsAThread * threads_ + panels - 1) / panels;
        const int32_t pieces = std::min(step.height, std::max(by_cache, by_threads));
        return (step.height + pieces - 1) / pieces;
    }

    void add(const ConvStep& step) {
        const std::vector<Segment>& segments = add_segments(step);
        ConvArgs args{};
        args.segments = segments.data();
        args.segment_count = static_cast<int32_t>(segments.size());
        args.weights = packed(step.weights);
        args.panel_floats = step.panel_floats;
        args.offsets = reinterpret_cast<const int32_t*>(packed(step.offsets));
        args.factors = packed(step.factors);
        args.bias = packed(step.bias);
        args.rows = rows(step.row);
        args.row_stride = layout_.padded_rows;
        args.dst = map(step.dst);
        args.height = step.height;
        args.width = step.width;
        args.step = step.step;
        args.y0 = step.y0;
        args.x0 = step.x0;
        args.add = map(step.add);
        args.scale = step.scale;
        args.panels = round_up(step.out_channels, kernels_.panel) / kernels_.panel;
        args.piece_rows = choose_piece_rows(step, args.panels);
        args.clears_border = step.clears_border;
        args.statistics = step.measures ? statistics(step.dst) : nullptr;
        add_task(kernels_.conv_items(args), kernels_.conv, args);
    }

    NormArgs norm_args(const NormStep& step) const {
        NormArgs args{};
        args.src = maps(step.src);
        args.dst = map(step.dst);
        args.add = map(step.add);
        args.scale = step.scale;
        args.eps = step.eps;
        const PlacedMap& dst = layout_.maps[static_cast<size_t>(step.dst)];
        args.steps = dst.scale > 0 ? 1 / dst.scale : 0;
        args.zero = dst.zero;
        args.kind = step.kind;
        args.groups = step.groups;
        args.activation = static_cast<Activation>(step.activation);
        args.weight = packed(step.weight);
        args.bias = packed(step.bias);
        args.rows = rows(step.row);
        args.row_stride = layout_.padded_rows;
        if (step.kind == UNETRT_GROUP) {
            for (int i = 0; i < 2; ++i) args.statistics[i] = statistics(step.src[i]);
        }
        args.workspace = places_.shared;
        return args;
    }

    void add(const NormStep& step) {
        const NormArgs args = norm_args(step);
        add_task(kernels_.norm_items(args), kernels_.norm, args);
    }

    void add(const MeasureStep& step) {
        const MeasureArgs args{map(step.map), statistics(step.map)};
        add_task(kernels_.measure_items(args), kernels_.measure, args);
    }

    AttentionArgs attention_args(const AttentionStep& step) const {
        AttentionArgs args{};
        args.qkv = map(step.src);
        args.dst = map(step.dst);
        args.heads = step.heads;
        args.dim = step.dim;
        args.memory = step.memory;
        args.learned = packed(step.learned);
        args.scale = step.scale;
        args.value_scale = step.value_scale;
        args.workspace = places_.shared;
        return args;
    }

    void add(const AttentionStep& step) {
        const AttentionArgs args = attention_args(step);
        const auto count = step.is_linear ? kernels_.linear_items : kernels_.attention_items;
        const auto kernel = step.is_linear ? kernels_.linear : kernels_.attention;
        for (int phase = 0; phase < kAttentionPhases; ++phase) {
            const int items = count(args, phase);
            if (items == 0) continue;
            bound_.tasks.push_back({items, [=](int item, float* scratch) { kernel(args, phase, item, scratch); }});
        }
    }

    void add(const NormGradientStep& step) {
        const NormGradientArgs args{norm_args(step.norm), map(step.gradient)};
        const auto kernel = kernels_.norm_gradient;
        for (int phase = 0; phase < kNormGradientPhases; ++phase) {
            const auto run = [=](int item, float*) { kernel(args, phase, item); };
            bound_.tasks.push_back({kernels_.norm_gradient_items(args), run});
        }
    }

    AttentionGradientArgs attention_gradient_args(const AttentionGradientStep& step) const {
        return {map(step.src), map(step.gradient), map(step.dst), step.heads, step.dim};
    }

    void add(const AttentionGradientStep& step) {
        const AttentionGradientArgs args = attention_gradient_args(step);
        const auto kernel = kernels_.attention_gradient;
        const auto run = [=](int item, float* scratch) { kernel(args, item, scratch); };
        bound_.tasks.push_back({kernels_.attention_gradient_items(args), run});
    }

    void add(const TokensStep& step) {
        const TokensArgs args{map(step.pixels), map(step.tokens), packed(step.learned)};
        if (step.is_gradient) {
            add_task(kernels_.pixels_items(args), kernels_.to_pixels, args);
        } else {
            add_task(kernels_.tokens_items(args), kernels_.to_tokens, args);
        }
    }

    ClassifyArgs classify_args(const ClassifyStep& step) const {
        return {map(step.src),     map(step.dst),  step.classes,        packed(step.weight),
                packed(step.bias), rows(step.row), layout_.padded_rows, nullptr};
    }

    void add(const ClassifyStep& step) {
        const ClassifyArgs args = classify_args(step);
        const Request* request = places_.request;
        const auto kernel = kernels_.classify;
        const int64_t behind = layout_.output_floats * batch_;
        const auto run = [=](int item, float* scratch) {
            ClassifyArgs now = args;
            now.log_p = request->out + behind;
            kernel(now, item, scratch);
        };
        bound_.tasks.push_back({kernels_.classify_items(args), run});
    }

    void add(const ResampleStep& step) {
        const ResampleArgs args{map(step.src), map(step.dst), map(step.add), step.scale, step.kind, step.pad};
        add_task(kernels_.resample_items(args), kernels_.resample, args);
    }

    void add(const CopyStep& step) {
        const CopyArgs args{maps(step.src), map(step.dst), map(step.add), step.scale};
        if (step.splits) {
            add_task(kernels_.split_items(args), kernels_.split, args);
        } else {
            add_task(kernels_.copy_items(args), kernels_.copy, args);
        }
    }

    void add(const PlanarStep& step) {
        const Map m = map(step.map);
        const Request* request = places_.request;
        const auto kernel = step.is_input ? kernels_.from_planar : kernels_.to_planar;
        const bool is_input = step.is_input;
        const auto run = [=](int item, float*) {
            // The kernel for inputs only reads them.
            kernel({is_input ? const_cast<float*>(request->x) : request->out, m}, item);
        };
        bound_.tasks.push_back({kernels_.planar_items({nullptr, m}), run});
    }

    const Layout& layout_;
    const Kernels& kernels_;
    const int32_t batch_;
    const int threads_;
    const Places places_;
    Bound bound_;
    int64_t shared_ = 0, scratch_ = 0;
};

}  // namespace

Memory count_memory(const Layout& layout, int32_t batch) { return Binder(layout, batch, 1, {}).measure(); }

Bound bind(const Layout& layout, int32_t batch, int threads, const Places& places) {
    return Binder(layout, batch, threads, places).bind();
}

}  // namespace unetrt
