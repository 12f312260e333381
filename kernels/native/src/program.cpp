#include "program.h"

#include <cmath>
#include <cstring>
#include <string>

#include "error.h"

namespace unetrt {

namespace {

constexpr size_t kHeader = 8, kMapWords = 5, kOperatorWords = 24;
static_assert(sizeof(unetrt_operator) == kOperatorWords * sizeof(int32_t));
constexpr int32_t kMostMaps = 1 << 16, kMostChannels = 1 << 18, kMostPixels = 1 << 14;
// Products of bytes whose sum an int32 holds.
constexpr int64_t kMostProducts = 66000;

std::string text(int64_t value) { return std::to_string(value); }

// Checks one operator after the other and remembers which maps were written.
class Checker {
  public:
    explicit Checker(const Program& program) : program_(program), written_(program.maps.size(), false) {}

    void check(size_t index) {
        index_ = index;
        op_ = &program_.operators[index];
        if (op_->code != UNETRT_OUTPUT) {
            require(is_map(op_->dst), "dst names no map", op_->dst);
            require(!written_[static_cast<size_t>(op_->dst)], "writes a map for the second time", op_->dst);
            require(op_->code == UNETRT_NORM || !dst().has_bytes(), "writes bytes, and is no norm", op_->dst);
        }
        switch (op_->code) {
            case UNETRT_INPUT: check_input(); break;
            case UNETRT_OUTPUT: check_output(); return;
            case UNETRT_CONV: check_conv(); break;
            case UNETRT_NORM: check_norm(); break;
            case UNETRT_ATTENTION:
            case UNETRT_LINEAR_ATTENTION: check_attention(); break;
            case UNETRT_RESAMPLE: check_resample(); break;
            case UNETRT_ADD: check_add(); break;
            case UNETRT_CONCAT: check_concat(); break;
            case UNETRT_TOKENS: check_tokens(op_->src[0], op_->dst); break;
            case UNETRT_PIXELS: check_tokens(op_->dst, op_->src[0]); break;
            case UNETRT_CLASSIFY: check_classify(); break;
            case UNETRT_NORM_GRADIENT: check_norm_gradient(); break;
            case UNETRT_ATTENTION_GRADIENT: check_attention_gradient(); break;
            default: fail("unknown code", op_->code);
        }
        written_[static_cast<size_t>(op_->dst)] = true;
    }

    void check_end() const {
        if (outputs_ != 1) throw Error("the program has " + text(outputs_) + " outputs; expected 1");
    }

  private:
    [[noreturn]] void fail(const std::string& what, int64_t got) const {
        throw Error("operator " + text(static_cast<int64_t>(index_)) + " (code " + text(op_->code) + "): " + what +
                    "; got " + text(got) + "; build the program again");
    }

    void require(bool holds, const char* what, int64_t got) const {
        if (!holds) fail(what, got);
    }

    bool is_map(int32_t map) const { return map >= 0 && static_cast<size_t>(map) < program_.maps.size(); }

    const MapShape& shape(int32_t map) const { return program_.maps[static_cast<size_t>(map)]; }
    const MapShape& dst() const { return shape(op_->dst); }

    void require_source(int32_t map) const {
        require_written(map);
        require(!shape(map).has_bytes(), "reads bytes, and is no plain convolution of them alone", map);
    }

    void require_written(int32_t map) const {
        require(is_map(map) && written_[static_cast<size_t>(map)], "reads a map that was not written", map);
        require(map != op_->dst, "reads the map that it writes", map);
    }

    void require_size(int32_t map, int32_t height, int32_t width) const {
        require(shape(map).height == height, "a source has another height than needed", shape(map).height);
        require(shape(map).width == width, "a source has another width than needed", shape(map).width);
    }

    // One or two sources of one size, which is the size given.
    int32_t require_sources(const int32_t (&maps)[2], int32_t height, int32_t width) const {
        require_source(maps[0]);
        require_size(maps[0], height, width);
        if (maps[1] != -1) {
            require_source(maps[1]);
            require_size(maps[1], height, width);
        }
        return shape(maps[0]).channels + (maps[1] == -1 ? 0 : shape(maps[1]).channels);
    }

    void require_single() const { require(op_->src[1] == -1, "takes one source", op_->src[1]); }

    void require_add() const {
        if (op_->add == -1) return;
        require_source(op_->add);
        require_size(op_->add, dst().height, dst().width);
        require(shape(op_->add).channels == dst().channels, "add has other channels than dst", op_->add);
    }

    void require_weights(int32_t first, int64_t count, bool is_optional) const {
        if (is_optional && first == -1) return;
        require(first >= 0 && first + count <= program_.weights, "weights lie outside the array", first);
    }

    void require_row(int64_t count) const {
        if (op_->row == -1) return;
        require(op_->row >= 0 && op_->row + count <= program_.row_width, "row lies outside the rows", op_->row);
    }

    void check_input() const {
        require(dst().channels == program_.in_channels, "dst has other channels than the input", dst().channels);
    }

    void check_output() {
        require_source(op_->src[0]);
        require_single();
        const int32_t channels = shape(op_->src[0]).channels;
        require(channels == program_.out_channels, "src has other channels than the output", channels);
        ++outputs_;
    }

    void check_conv() const {
        const int64_t k = op_->kernel, out = dst().channels;
        require(k >= 1 && k <= 7, "kernel is not in 1 to 7", k);
        require(op_->pad >= 0 && op_->pad < 8, "pad is not in 0 to 7", op_->pad);
        require_written(op_->src[0]);
        const int32_t height = shape(op_->src[0]).height, width = shape(op_->src[0]).width;
        const int64_t in = require_conv_sources(height, width);
        require_conv_size(height, width);
        require_weights(op_->weight, in * out * k * k, false);
        require_weights(op_->bias, out, true);
        require_row(out);
        require_add();
        if (op_->extra[0] == -1) return require(op_->extra[1] == -1, "extra has a second map only", op_->extra[1]);
        require(op_->mode == UNETRT_PLAIN && op_->stride == 1, "extra needs mode plain and stride 1", op_->mode);
        const int64_t extra = require_sources(op_->extra, dst().height, dst().width);
        require_weights(op_->extra_weight, extra * out, false);
        require_weights(op_->extra_bias, out, true);
    }

    int64_t require_conv_sources(int32_t height, int32_t width) const {
        if (!shape(op_->src[0]).has_bytes()) return require_sources(op_->src, height, width);
        require_single();
        require(op_->mode == UNETRT_PLAIN && op_->stride == 1, "bytes need mode plain and stride 1", op_->mode);
        const int64_t channels = shape(op_->src[0]).channels, products = channels * op_->kernel * op_->kernel;
        require(products <= kMostProducts, "too many products of bytes for one sum", products);
        return channels;
    }

    void require_conv_size(int32_t height, int32_t width) const {
        if (op_->mode == UNETRT_PLAIN) {
            require(op_->stride == 1 || op_->stride == 2, "stride is not 1 or 2", op_->stride);
            require_plain_end(height, dst().height);
            return require_plain_end(width, dst().width);
        }
        const bool is_upsampled = op_->mode == UNETRT_UPSAMPLED && op_->kernel == 3 && op_->stride == 1;
        const bool is_transposed = op_->mode == UNETRT_TRANSPOSED && op_->kernel == 4 && op_->stride == 2;
        require(is_upsampled || is_transposed, "mode, kernel and stride do not go together", op_->mode);
        require(op_->pad == 1, "pad is not 1", op_->pad);
        require(dst().height == 2 * height && dst().width == 2 * width, "dst is not twice as large as src", op_->dst);
    }

    // The last window may reach over the end by less than a kernel.
    void require_plain_end(int32_t in, int32_t out) const {
        const int32_t last = (out - 1) * op_->stride + op_->kernel - op_->pad - in;
        require(last < op_->kernel, "dst is too large for src", out);
    }

    void check_norm() const {
        const int64_t channels = require_sources(op_->src, dst().height, dst().width);
        require(channels == dst().channels, "dst has other channels than the sources", dst().channels);
        require(op_->kind >= UNETRT_GROUP && op_->kind <= UNETRT_NO_NORM, "unknown kind", op_->kind);
        require(op_->activation >= UNETRT_IDENTITY && op_->activation <= UNETRT_GELU, "unknown activation",
                op_->activation);
        if (op_->kind == UNETRT_GROUP) {
            require(op_->groups >= 1 && channels % op_->groups == 0, "groups do not divide the channels", op_->groups);
        }
        require_weights(op_->weight, channels, op_->kind == UNETRT_NO_NORM);
        require_weights(op_->bias, channels, true);
        require_row(2 * channels);
        require_add();
    }

    void check_attention() const {
        require_single();
        require_source(op_->src[0]);
        require_size(op_->src[0], dst().height, dst().width);
        require(op_->heads >= 1 && op_->heads <= kMostChannels, "heads is not positive", op_->heads);
        require(op_->dim >= 1 && op_->dim <= kMostChannels, "dim is not positive", op_->dim);
        require(op_->memory >= 0 && op_->memory <= kMostChannels, "memory is negative or too large", op_->memory);
        const int64_t inner = static_cast<int64_t>(op_->heads) * op_->dim;
        require(dst().channels == inner, "dst has other channels than the heads", dst().channels);
        require(shape(op_->src[0]).channels == 3 * inner, "src does not have three times the heads' channels", inner);
        if (op_->memory > 0) require_weights(op_->weight, 2 * inner * op_->memory, false);
    }

    void check_resample() const {
        require_single();
        require_source(op_->src[0]);
        require_add();
        const MapShape& src = shape(op_->src[0]);
        MapShape wanted = src;
        switch (op_->kind) {
            case UNETRT_NEAREST_UP:
            case UNETRT_FIR_UP: wanted = {src.channels, 2 * src.height, 2 * src.width}; break;
            case UNETRT_AVERAGE_DOWN:
            case UNETRT_FIR_DOWN: wanted = {src.channels, src.height / 2, src.width / 2}; break;
            case UNETRT_SPACE_TO_DEPTH:
                require(src.height % 2 == 0 && src.width % 2 == 0, "space to depth of an odd size", src.height);
                wanted = {4 * src.channels, src.height / 2, src.width / 2};
                break;
            case UNETRT_PAD:
                require(op_->pad > -kMostPixels && op_->pad < kMostPixels, "pad is out of range", op_->pad);
                wanted = {src.channels, src.height + 2 * op_->pad, src.width + 2 * op_->pad};
                break;
            default: fail("unknown kind", op_->kind);
        }
        require(dst().channels == wanted.channels, "dst has other channels than the result", dst().channels);
        require_size(op_->dst, wanted.height, wanted.width);
    }

    void check_add() const {
        require_source(op_->src[1]);
        const int32_t channels = require_sources(op_->src, dst().height, dst().width) / 2;
        const bool is_same = shape(op_->src[0]).channels == channels && shape(op_->src[1]).channels == channels;
        require(is_same && channels == dst().channels, "the operands and dst differ in channels", dst().channels);
    }

    void check_concat() const {
        const int32_t channels = require_sources(op_->src, dst().height, dst().width);
        require(channels == dst().channels, "dst has other channels than the sources", dst().channels);
    }

    void check_tokens(int32_t pixels, int32_t tokens) const {
        require_single();
        require_source(op_->src[0]);
        const MapShape &map = shape(pixels), &row = shape(tokens);
        require(map.channels == row.channels, "dst has other channels than src", dst().channels);
        const int64_t count = static_cast<int64_t>(map.height) * map.width + 1;
        require(row.height == 1 && row.width == count, "the tokens are not one more than the pixels", row.width);
        if (op_->code == UNETRT_TOKENS) require_weights(op_->weight, count * map.channels, true);
    }

    void check_classify() {
        require_single();
        require_source(op_->src[0]);
        require_size(op_->src[0], dst().height, dst().width);
        require(shape(op_->src[0]).channels == dst().channels, "dst has other channels than src", dst().channels);
        require(op_->groups >= 1 && op_->groups <= kMostChannels, "groups is not positive", op_->groups);
        require_weights(op_->weight, static_cast<int64_t>(op_->groups) * dst().channels, false);
        require_weights(op_->bias, op_->groups, false);
        require(op_->row != -1, "there is no row for labels", op_->row);
        require_row(2);
        ++classifiers_;
        require(classifiers_ == 1, "classifies for the second time", classifiers_);
    }

    // The result's gradient is of src's shape.
    void require_gradient(int32_t map, const MapShape& wanted) const {
        require_source(map);
        require_size(map, wanted.height, wanted.width);
        require(shape(map).channels == wanted.channels, "the gradient has other channels", shape(map).channels);
    }

    void check_norm_gradient() const {
        require_source(op_->src[0]);
        require_gradient(op_->src[0], dst());
        require_gradient(op_->src[1], dst());
        const int64_t channels = dst().channels;
        require(op_->kind == UNETRT_GROUP, "only group norm has a gradient", op_->kind);
        require(op_->activation >= UNETRT_IDENTITY && op_->activation <= UNETRT_RELU, "this activation has no gradient",
                op_->activation);
        require(op_->groups >= 1 && channels % op_->groups == 0, "groups do not divide the channels", op_->groups);
        require_weights(op_->weight, channels, false);
        require_weights(op_->bias, channels, true);
        require_row(2 * channels);
        require_add();
    }

    void check_attention_gradient() const {
        require_gradient(op_->src[0], dst());
        require(op_->heads >= 1 && op_->heads <= kMostChannels, "heads is not positive", op_->heads);
        require(op_->dim >= 1 && op_->dim <= kMostChannels, "dim is not positive", op_->dim);
        require(op_->memory == 0, "memory has no gradient", op_->memory);
        const int64_t inner = static_cast<int64_t>(op_->heads) * op_->dim;
        require(dst().channels == 3 * inner, "dst does not have three times the heads' channels", dst().channels);
        require_gradient(op_->src[1], {static_cast<int32_t>(inner), dst().height, dst().width});
    }

    const Program& program_;
    std::vector<bool> written_;
    size_t index_ = 0;
    const unetrt_operator* op_ = nullptr;
    int outputs_ = 0, classifiers_ = 0;
};

int32_t require_range(int32_t value, int32_t least, int32_t most, const char* what) {
    if (value >= least && value <= most) return value;
    throw Error(std::string(what) + " is " + text(value) + "; expected " + text(least) + " to " + text(most) +
                "; build the program again");
}

MapShape read_map(const int32_t* words) {
    MapShape map{require_range(words[0], 1, kMostChannels, "channels of a map"),
                 require_range(words[1], 1, kMostPixels, "height of a map"),
                 require_range(words[2], 1, kMostPixels, "width of a map")};
    std::memcpy(&map.scale, words + 3, sizeof map.scale);
    const bool is_scale = std::isnormal(map.scale) && std::isnormal(1 / map.scale) && map.scale > 0;
    if (words[3] != 0 && !is_scale) {
        throw Error("the scale of a map is " + std::to_string(map.scale) + "; expected 0 or a positive number; build " +
                    "the program again");
    }
    map.zero = require_range(words[4], 0, map.has_bytes() ? 255 : 0, "the zero of a map");
    return map;
}

}  // namespace

Program read_program(const int32_t* words, uint64_t count) {
    if (words == nullptr || count < kHeader || words[0] != UNETRT_MAGIC) {
        throw Error("these words are no program: they do not begin with its header");
    }
    if (words[1] != UNETRT_FORMAT) {
        throw Error("the program has format " + text(words[1]) + "; this library reads " + text(UNETRT_FORMAT));
    }
    const auto maps = static_cast<size_t>(require_range(words[2], 1, kMostMaps, "the number of maps"));
    const auto operators = static_cast<size_t>(require_range(words[3], 1, kMostMaps, "the number of operators"));
    if (count != kHeader + maps * kMapWords + operators * kOperatorWords) {
        throw Error("the program has " + text(static_cast<int64_t>(count)) + " words, and its header says " +
                    text(static_cast<int64_t>(kHeader + maps * kMapWords + operators * kOperatorWords)));
    }
    Program program{};
    program.in_channels = require_range(words[4], 1, kMostChannels, "input channels");
    program.out_channels = require_range(words[5], 1, kMostChannels, "output channels");
    program.row_width = require_range(words[6], 0, 1 << 24, "the row width");
    program.weights = require_range(words[7], 0, INT32_MAX, "the number of weights");
    for (size_t i = 0; i < maps; ++i) {
        program.maps.push_back(read_map(words + kHeader + i * kMapWords));
    }
    program.operators.resize(operators);
    std::memcpy(program.operators.data(), words + kHeader + maps * kMapWords, operators * sizeof(unetrt_operator));
    Checker checker(program);
    for (size_t i = 0; i < operators; ++i) checker.check(i);
    checker.check_end();
    return program;
}

}  // namespace unetrt
