// Tensors in, kernels called: checks of types and shapes are nanobind's and the few below; torch is not linked.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sys/mman.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "move_bytes.h"
#include "recycle.h"

namespace nb = nanobind;

namespace {

using namespace peerlm;

template <class T, int... Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>..., nb::c_contig, nb::device::cpu>;
using In = const float;
using Ids = Array<const int64_t, 2>;
using AnyTable = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

template <class Optional>
auto* data_or_null(Optional& array) {
  return array ? array->data() : nullptr;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// The value of this name; `what` is what messages call it.
template <class Value>
Value named(const std::string& name, const char* what, std::initializer_list<std::pair<const char*, Value>> values) {
  for (const auto& [each, value] : values)
    if (name == each) return value;
  throw std::invalid_argument("unknown " + std::string(what) + " " + name);
}

Weighting weighting_of(const std::string& name) {
  using W = Weighting;
  return named<W>(name, "weighting", {{"softmax", W::softmax}, {"sigmoid", W::sigmoid}, {"relu", W::relu}, {"none", W::none}});
}

Pairing pairing_of(const std::string& name) {
  return named<Pairing>(name, "pairing", {{"row-major", Pairing::row_major}, {"shells", Pairing::shells}});
}

Scores scores_of(const std::string& name) {
  return named<Scores>(name, "scores", {{"fp32", Scores::f32}, {"bf16", Scores::bf16}, {"int8", Scores::i8}});
}

bool has_scores(const Kernels& chosen, Scores scores) {
  return scores == Scores::f32 || (scores == Scores::bf16 ? chosen.bf16_scores : chosen.int8_scores);
}

Activation activation_of(const std::string& name) {
  using A = Activation;
  return named<A>(name, "activation",
                  {{"gelu", A::gelu},
                   {"gelu_tanh", A::gelu_tanh},
                   {"relu", A::relu},
                   {"silu", A::silu},
                   {"identity", A::identity},
                   {"one_plus", A::one_plus}});
}

using Scales = std::optional<nb::ndarray<In, nb::c_contig, nb::device::cpu>>;

// Rows of int4, uint8 with a scale for each group of a vector.
Table int4_table(const AnyTable& rows, const Scales& scales) {
  const int64_t groups = (int64_t)scales->shape(2);
  require(rows.dtype() == nb::dtype<uint8_t>() && scales->shape(0) == rows.shape(0) && scales->shape(1) == rows.shape(1) &&
              (int64_t)rows.shape(2) == groups * 16,
          "rows of int4 must be (N, parts, D / 2) in uint8, and scales (N, parts, D / 32)");
  return {rows.data(), scales->data(), RowFormat::i4, (int64_t)rows.shape(0), (int64_t)rows.shape(1), groups * 32};
}

Table table_of(const AnyTable& rows, const Scales& scales) {
  if (scales && scales->ndim() == 3) return int4_table(rows, scales);
  RowFormat format;
  if (rows.dtype() == nb::dtype<float>()) format = RowFormat::f32;
  else if (rows.dtype() == nb::dtype<int8_t>()) format = RowFormat::i8;
  else if (rows.dtype() == nb::dtype<uint8_t>()) format = RowFormat::f8;
  else if (rows.dtype().code == (uint8_t)nb::dlpack::dtype_code::Bfloat) format = RowFormat::bf16;
  else throw std::invalid_argument("rows must be float32, bfloat16, int8, or float8 given as uint8");
  require((format == RowFormat::i8 || format == RowFormat::f8) == scales.has_value(),
          "rows of 8 bits need scales, and others have none");
  if (scales) require(scales->ndim() == 2 && scales->shape(0) == rows.shape(0) && scales->shape(1) == rows.shape(1), "scales must be (N, parts)");
  return {rows.data(), scales ? scales->data() : nullptr, format, (int64_t)rows.shape(0), (int64_t)rows.shape(1),
          (int64_t)rows.shape(2)};
}

// Ids come from callers, and a wrong one would read or write anywhere.
void check_ids(const int64_t* ids, int64_t count, int64_t num_rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= num_rows)
      throw nb::index_error(("expert id " + std::to_string(ids[i]) + " is not in 0 .. " + std::to_string(num_rows - 1)).c_str());
}

// As check_ids, but ids may be holes; returns how many are.
int64_t count_holes(const int64_t* ids, int64_t count, int64_t num_rows) {
  int64_t holes = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] == HOLE) ++holes;
    else if (ids[i] < 0 || ids[i] >= num_rows) check_ids(ids + i, 1, num_rows);
  }
  return holes;
}

// The entries of ids (T, P) that are no holes, one after another; tensors of all entries become those of these, and back.
class Kept {
 public:
  Kept(const int64_t* ids, int64_t tokens, int64_t per_token, int64_t num_rows) : count_(tokens * per_token) {
    const int64_t holes = count_holes(ids, count_, num_rows);
    if (holes == 0) {
      ids_ = ids;
      return;
    }
    starts_.reserve(tokens + 1);
    places_.reserve(count_ - holes);
    for (int64_t entry = 0; entry < count_; ++entry) {
      if (entry % per_token == 0) starts_.push_back((int64_t)places_.size());
      if (ids[entry] == HOLE) continue;
      places_.push_back(entry);
      found_.push_back(ids[entry]);
    }
    starts_.push_back((int64_t)places_.size());
    found_.push_back(0);  // so that there is an address
    ids_ = found_.data();
  }

  const int64_t* ids() const { return ids_; }
  const int64_t* starts() const { return starts_.empty() ? nullptr : starts_.data(); }

  // What a tensor (T, P, width) has for these entries, in `room` where that is not the tensor itself.
  const float* gather(const float* all, int64_t width, std::vector<float>& room) const {
    if (starts_.empty() || !all) return all;
    room.resize(places_.size() * width + 1);
    for (size_t i = 0; i < places_.size(); ++i)
      for (int64_t j = 0; j < width; ++j) room[i * width + j] = all[places_[i] * width + j];
    return room.data();
  }

  // Where results (T, P, width) of these entries are written to: `scatter` puts them into their places.
  float* space(float* all, int64_t width, std::vector<float>& room) const {
    if (starts_.empty() || !all) return all;
    room.resize(places_.size() * width + 1);
    return room.data();
  }

  // Holes become 0.
  void scatter(const std::vector<float>& room, int64_t width, float* all) const {
    if (starts_.empty() || !all) return;
    for (int64_t i = 0; i < count_ * width; ++i) all[i] = 0.0f;
    for (size_t i = 0; i < places_.size(); ++i)
      for (int64_t j = 0; j < width; ++j) all[places_[i] * width + j] = room[i * width + j];
  }

 private:
  int64_t count_;
  const int64_t* ids_;
  std::vector<int64_t> starts_, places_, found_;
};

// Queries (T, H, 2, C) and sub-keys (2, H or 1, n, C) of one index.
void require_fit(const Array<In, 4>& query, const Array<In, 4>& sub_keys, int64_t k) {
  require(query.shape(2) == 2 && sub_keys.shape(0) == 2 && sub_keys.shape(3) == query.shape(3) &&
              (sub_keys.shape(1) == 1 || sub_keys.shape(1) == query.shape(1)) && k >= 1 && k <= (int64_t)sub_keys.shape(2),
          "query (T, H, 2, C) and sub_keys (2, H or 1, n, C) do not fit, or k is not in 1 .. n");
}

void retrieve_(Array<In, 4> query, Array<In, 4> sub_keys, int64_t k, const std::string& weighting,
               const std::string& pairing, const std::string& scores, int threads, Array<float, 3> weights, Array<int64_t, 3> ids) {
  const RetrieveArgs a{query.data(),
                       sub_keys.data(),
                       (int64_t)query.shape(0),
                       (int64_t)query.shape(1),
                       (int64_t)sub_keys.shape(1),
                       (int64_t)sub_keys.shape(2),
                       (int64_t)query.shape(3),
                       k,
                       weighting_of(weighting),
                       pairing_of(pairing),
                       scores_of(scores),
                       threads,
                       weights.data(),
                       ids.data(),
                       0.0f};
  require_fit(query, sub_keys, k);
  require(weights.size() == (size_t)(a.tokens * a.heads * k) && ids.size() == weights.size(), "outputs must be (T, H, k)");
  const Kernels& chosen = kernels();
  require(has_scores(chosen, a.scores), "this machine has no dot products as narrow as these scores");
  nb::gil_scoped_release released;
  chosen.retrieve(a);
}

void retrieve_backward_(Array<In, 3> grad_weights, Array<In, 3> weights, Array<const int64_t, 3> ids, Array<In, 4> query,
                        Array<In, 4> sub_keys, const std::string& weighting, const std::string& pairing, int threads,
                        std::optional<Array<float, 4>> grad_query, std::optional<Array<float, 4>> grad_sub_keys) {
  const RetrieveBackwardArgs a{grad_weights.data(),
                               weights.data(),
                               ids.data(),
                               query.data(),
                               sub_keys.data(),
                               (int64_t)query.shape(0),
                               (int64_t)query.shape(1),
                               (int64_t)sub_keys.shape(1),
                               (int64_t)sub_keys.shape(2),
                               (int64_t)query.shape(3),
                               (int64_t)ids.shape(2),
                               weighting_of(weighting),
                               pairing_of(pairing),
                               threads,
                               data_or_null(grad_query),
                               data_or_null(grad_sub_keys)};
  require_fit(query, sub_keys, a.k);
  require(weights.size() == ids.size() && grad_weights.size() == ids.size() &&
              ids.size() == (size_t)(a.tokens * a.heads * a.k),
          "shapes of weights and ids do not fit the query");
  require(!grad_query || grad_query->size() == query.size(), "grad_query must have the shape of query");
  require(!grad_sub_keys || grad_sub_keys->size() == sub_keys.size(), "grad_sub_keys must have the shape of sub_keys");
  check_ids(ids.data(), ids.size(), a.n * a.n);
  nb::gil_scoped_release released;
  kernels().retrieve_backward(a);
}

void mix_(std::optional<Array<In, 2>> x, Array<In, 2> weights, Ids ids, AnyTable rows,
          Scales scales, const std::string& activation, int threads,
          std::optional<Array<float, 3>> hidden, Array<float, 2> y) {
  const Table table = table_of(rows, scales);
  const int64_t tokens = (int64_t)ids.shape(0), per_token = (int64_t)ids.shape(1);
  require(weights.size() == ids.size() && (int64_t)y.size() == tokens * table.dim, "shapes of weights, ids and y do not fit");
  require(x ? table.parts > 1 && x->size() == y.size() : table.parts == 1, "experts need x like y, and memory values none");
  require(!hidden || (int64_t)hidden->size() == (int64_t)ids.size() * (table.parts - 1), "hidden must be (T, P, parts - 1)");
  const Kept kept(ids.data(), tokens, per_token, table.num_rows);
  std::vector<float> weights_room, hidden_room;
  const MixArgs a{data_or_null(x),
                  kept.gather(weights.data(), 1, weights_room),
                  kept.ids(),
                  table,
                  tokens,
                  per_token,
                  kept.starts(),
                  activation_of(activation),
                  threads,
                  kept.space(data_or_null(hidden), table.parts - 1, hidden_room),
                  y.data()};
  nb::gil_scoped_release released;
  (x ? kernels().mix_experts : kernels().mix_values)(a);
  kept.scatter(hidden_room, table.parts - 1, data_or_null(hidden));
}

void mix_backward_(Array<In, 2> grad_y, Array<In, 2> weights, Ids ids, std::optional<Array<In, 3>> hidden, AnyTable rows,
                   Scales scales, const std::string& activation, int threads,
                   std::optional<Array<float, 2>> grad_x, std::optional<Array<float, 2>> grad_weights,
                   std::optional<Array<float, 3>> coefficients) {
  const Table table = table_of(rows, scales);
  const int64_t tokens = (int64_t)ids.shape(0), per_token = (int64_t)ids.shape(1), entries = tokens * per_token;
  require((int64_t)weights.size() == entries && (int64_t)grad_y.size() == tokens * table.dim,
          "shapes of weights, ids and grad_y do not fit");
  require(hidden ? (int64_t)hidden->size() == entries * (table.parts - 1) : table.parts == 1, "experts need hidden");
  require(!grad_x || grad_x->size() == grad_y.size(), "grad_x must have the shape of grad_y");
  require(!grad_weights || (int64_t)grad_weights->size() == entries, "grad_weights must have the shape of ids");
  require(!coefficients || (int64_t)coefficients->size() == entries * table.parts, "coefficients must be (T, P, parts)");
  const Kept kept(ids.data(), tokens, per_token, table.num_rows);
  std::vector<float> weights_room, hidden_room, grad_weights_room, coefficients_room;
  const MixBackwardArgs a{grad_y.data(),
                          kept.gather(weights.data(), 1, weights_room),
                          kept.ids(),
                          kept.gather(data_or_null(hidden), table.parts - 1, hidden_room),
                          table,
                          tokens,
                          per_token,
                          kept.starts(),
                          activation_of(activation),
                          threads,
                          data_or_null(grad_x),
                          kept.space(data_or_null(grad_weights), 1, grad_weights_room),
                          kept.space(data_or_null(coefficients), table.parts, coefficients_room)};
  nb::gil_scoped_release released;
  if (hidden) kernels().mix_experts_backward(a);
  else if (grad_weights) kernels().mix_values_backward(a);
  kept.scatter(grad_weights_room, 1, data_or_null(grad_weights));
  kept.scatter(coefficients_room, table.parts, data_or_null(coefficients));
}

QueryNorm query_norm_of(const std::string& name) {
  using Q = QueryNorm;
  return named<Q>(name, "query norm", {{"none", Q::none}, {"batch", Q::batch}, {"layer", Q::layer}});
}

// Some after others: a token's bits are those that it has alone.
void decode_tokens(DecodeArgs a, const float* x, int64_t tokens, float* y) {
  const int64_t dim = a.mix.table.dim;
  for (int64_t first = 0; first < tokens; first += FEW_TOKENS) {
    a.mix.x = x + first * dim;
    a.mix.y = y + first * dim;
    a.mix.tokens = tokens - first < FEW_TOKENS ? tokens - first : FEW_TOKENS;
    kernels().decode(a);
  }
}

void dense_tokens(DenseArgs a, const float* x, int64_t tokens, int threads, float* y) {
  a.x = x;
  a.y = y;
  a.tokens = tokens;
  a.threads = threads;
  kernels().dense(a);
}

// A layer whose tensors stay where they are; tokens come as addresses, for an array costs more than the work on it.
struct WholeLayer {
  DecodeArgs args;

  void run(uintptr_t x, int64_t tokens, int, uintptr_t y) const {
    nb::gil_scoped_release released;
    decode_tokens(args, reinterpret_cast<const float*>(x), tokens, reinterpret_cast<float*>(y));
  }
};

// norms: mean and variance of a batch norm, and weight and bias of any.
WholeLayer whole_layer_(Array<In, 2> query_map, const std::string& norm, const std::vector<Array<In, 1>>& norms, float epsilon,
                        Array<In, 4> sub_keys, float key_length, int64_t k, const std::string& weighting, const std::string& pairing,
                        float weight_scale, AnyTable rows, Scales scales, const std::string& activation) {
  const Table table = table_of(rows, scales);
  const int64_t half_dim = (int64_t)sub_keys.shape(3), features = (int64_t)query_map.shape(0);
  const int64_t sets = (int64_t)sub_keys.shape(1), heads = features / (2 * half_dim), n = (int64_t)sub_keys.shape(2);
  DecodeArgs a{};
  a.query_map = query_map.data();
  a.norm = query_norm_of(norm);
  const size_t wanted = a.norm == QueryNorm::batch ? 4 : a.norm == QueryNorm::layer ? 2 : 0;
  require(norms.size() == wanted, "a batch norm has four vectors, a layer norm two, and none none");
  for (const auto& each : norms)
    require((int64_t)each.size() == (a.norm == QueryNorm::batch ? features : 2 * half_dim), "vectors of the norm do not fit");
  if (a.norm == QueryNorm::batch) a.mean = norms[0].data(), a.variance = norms[1].data();
  if (wanted) a.weight = norms[wanted - 2].data(), a.bias = norms[wanted - 1].data();
  a.epsilon = epsilon;
  a.weight_scale = weight_scale;
  a.retrieve = {nullptr, sub_keys.data(), 0,           heads,  sets,   n, half_dim, k, weighting_of(weighting), pairing_of(pairing),
                Scores::f32, 1, nullptr, nullptr, key_length};
  a.mix = {nullptr, nullptr, nullptr, table, 0, heads * k, nullptr, activation_of(activation), 1, nullptr, nullptr};
  require(sub_keys.shape(0) == 2 && features == heads * 2 * half_dim && (sets == 1 || sets == heads) && k >= 1 && k <= n &&
              n * n == table.num_rows && table.parts > 1 && (int64_t)query_map.shape(1) == table.dim,
          "query map (H * 2 C, D), sub_keys (2, H or 1, n, C), k and rows (n * n, 2 or 3, D) do not fit");
  return {a};
}

// As `WholeLayer`, of a dense layer.
struct DenseLayer {
  DenseArgs args;

  void run(uintptr_t x, int64_t tokens, int threads, uintptr_t y) const {
    nb::gil_scoped_release released;
    dense_tokens(args, reinterpret_cast<const float*>(x), tokens, threads, reinterpret_cast<float*>(y));
  }
};

using Matrix = Array<In, 2>;

DenseLayer dense_layer_(Matrix down, std::optional<Matrix> gate, Matrix up, const std::string& activation) {
  const int64_t hidden = (int64_t)down.shape(0), dim = (int64_t)down.shape(1);
  require(up.shape(0) == down.shape(1) && up.shape(1) == down.shape(0) &&
              (!gate || (gate->shape(0) == down.shape(0) && gate->shape(1) == down.shape(1))),
          "down (F, D), gate (F, D) and up (D, F) do not fit");
  return {{down.data(), data_or_null(gate), up.data(), dim, hidden, activation_of(activation), nullptr, 0, 1, nullptr}};
}

// An RMSNorm whose weight stays where it is.
struct Norm {
  NormArgs args;

  void run(uintptr_t hidden, int64_t rows, uintptr_t added, uintptr_t y) const {
    NormArgs a = args;
    a.hidden = reinterpret_cast<float*>(hidden);
    a.added = reinterpret_cast<const float*>(added);
    a.y = reinterpret_cast<float*>(y);
    a.rows = rows;
    nb::gil_scoped_release released;
    kernels().add_and_norm(a);
  }
};

NormArgs norm_of(const Array<In, 1>& weight, float epsilon) {
  return {weight.data(), epsilon, 0, (int64_t)weight.size(), nullptr, nullptr, nullptr};
}

Norm norm_(Array<In, 1> weight, float epsilon) { return {norm_of(weight, epsilon)}; }

// Of a block's cache: the addresses of keys and values, then strides of rows and heads, of keys and of values.
using Place = std::array<int64_t, 6>;

// What differs from token to token in all blocks alike.
struct NewTokens {
  int64_t rows, columns;
  const int64_t *mask, *positions;
  int64_t positions_stride;
  int threads;

  // Whether the mask hides one of them.
  bool hidden() const {
    for (int64_t row = 0; mask && row < rows; ++row)
      if (!mask[row * columns + columns - 1]) return true;
    return false;
  }
};

void step_of_block(AttentionStepArgs a, const NewTokens& tokens, float* hidden, const float* added, const Place& place, float* y) {
  a.norm.hidden = hidden, a.norm.added = added, a.norm.y = y, a.norm.rows = tokens.rows;
  a.keys = {reinterpret_cast<float*>(place[0]), place[2], place[3]};
  a.values = {reinterpret_cast<float*>(place[1]), place[4], place[5]};
  a.columns = tokens.columns, a.mask = tokens.mask, a.threads = tokens.threads;
  a.positions = tokens.positions, a.positions_stride = tokens.positions_stride;
  kernels().attention_step(a);
}

// A block's attention whose weights stay where they are; what differs from token to token comes as addresses.
struct AttentionStep {
  AttentionStepArgs args;

  // False, and nothing is done, where the mask hides a new token.
  bool run(uintptr_t hidden, int64_t rows, uintptr_t added, const Place& place, int64_t columns, uintptr_t mask, uintptr_t positions,
           int64_t positions_stride, int threads, uintptr_t y) const {
    const NewTokens tokens{rows, columns, reinterpret_cast<const int64_t*>(mask), reinterpret_cast<const int64_t*>(positions),
                           positions_stride, threads};
    if (tokens.hidden()) return false;
    nb::gil_scoped_release released;
    step_of_block(args, tokens, reinterpret_cast<float*>(hidden), reinterpret_cast<const float*>(added), place, reinterpret_cast<float*>(y));
    return true;
  }
};

// Attention and feed-forward layers of all blocks, and the norm behind them. What was given stays where it is.
struct Blocks {
  struct Block {
    AttentionStepArgs step;
    std::optional<DecodeArgs> experts;
    std::optional<DenseArgs> dense;
  };
  std::vector<Block> blocks;
  NormArgs last;

  // As of `AttentionStep`, with a place for each block.
  bool run(uintptr_t hidden, int64_t rows, const std::vector<Place>& places, int64_t columns, uintptr_t mask, uintptr_t positions,
           int64_t positions_stride, int threads, uintptr_t y) const {
    require(places.size() == blocks.size(), "each block needs keys, values and their strides");
    const NewTokens tokens{rows, columns, reinterpret_cast<const int64_t*>(mask), reinterpret_cast<const int64_t*>(positions),
                           positions_stride, threads};
    if (tokens.hidden()) return false;
    nb::gil_scoped_release released;
    const size_t size = (size_t)(rows * last.dim);
    std::vector<float> memory(2 * size);
    float *const normed = memory.data(), *const added = normed + size;
    for (size_t i = 0; i < blocks.size(); ++i) {
      step_of_block(blocks[i].step, tokens, reinterpret_cast<float*>(hidden), i ? added : nullptr, places[i], normed);
      if (blocks[i].dense) dense_tokens(*blocks[i].dense, normed, rows, threads, added);
      else decode_tokens(*blocks[i].experts, normed, rows, added);
    }
    NormArgs a = last;
    a.hidden = reinterpret_cast<float*>(hidden);
    a.added = blocks.empty() ? nullptr : added;
    a.y = reinterpret_cast<float*>(y);
    a.rows = rows;
    kernels().add_and_norm(a);
    return true;
  }
};

Blocks blocks_(const std::vector<const AttentionStep*>& steps, const std::vector<std::pair<const WholeLayer*, const DenseLayer*>>& layers,
               const Norm& last) {
  require(steps.size() == layers.size(), "each block has attention and a layer");
  Blocks found{{}, last.args};
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto& [experts, dense] = layers[i];
    const AttentionStepArgs& step = steps[i]->args;
    require((experts == nullptr) != (dense == nullptr), "a layer is of experts or dense");
    require(step.norm.dim == last.args.dim && (experts ? experts->args.mix.table.dim : dense->args.dim) == last.args.dim,
            "widths of blocks differ");
    found.blocks.push_back({step, experts ? std::optional(experts->args) : std::nullopt, dense ? std::optional(dense->args) : std::nullopt});
  }
  return found;
}

AttentionStep attention_step_(Array<In, 1> norm, float epsilon, Array<In, 1> after, float after_epsilon, Matrix query_map, Matrix key_map,
                              Matrix value_map, Matrix output_map, std::optional<Array<In, 1>> query_norm,
                              std::optional<Array<In, 1>> key_norm, float head_epsilon, Array<In, 1> frequencies, float rotation_scale,
                              float scaling, std::optional<std::array<Array<In, 1>, 4>> shift) {
  const int64_t dim = (int64_t)norm.size(), size = 2 * (int64_t)frequencies.size();
  const int64_t wide = (int64_t)query_map.shape(0), narrow = (int64_t)key_map.shape(0);
  require(size > 0 && wide % size == 0 && narrow % size == 0 && narrow > 0 && wide % narrow == 0 && value_map.shape(0) == key_map.shape(0) &&
              (int64_t)after.size() == dim && (int64_t)query_map.shape(1) == dim && (int64_t)key_map.shape(1) == dim &&
              (int64_t)value_map.shape(1) == dim && (int64_t)output_map.shape(0) == dim && (int64_t)output_map.shape(1) == wide &&
              (!query_norm || (int64_t)query_norm->size() == size) && (!key_norm || (int64_t)key_norm->size() == size),
          "norms (D), maps (H * C, D), (G * C, D), (G * C, D) and (D, H * C), and frequencies (C / 2) do not fit");
  for (int i = 0; shift && i < 4; ++i) require((int64_t)(*shift)[i].size() == narrow / size, "weights of a shift do not fit its heads");
  AttentionStepArgs a{};
  a.norm = norm_of(norm, epsilon);
  a.after_weight = after.data(), a.after_epsilon = after_epsilon;
  a.query_map = query_map.data(), a.key_map = key_map.data(), a.value_map = value_map.data(), a.output_map = output_map.data();
  a.query_norm = data_or_null(query_norm), a.key_norm = data_or_null(key_norm), a.head_epsilon = head_epsilon;
  a.frequencies = frequencies.data(), a.rotation_scale = rotation_scale, a.scaling = scaling;
  a.heads = wide / size, a.groups = narrow / size, a.head_dim = size;
  if (shift) a.shift = {(*shift)[0].data(), (*shift)[1].data(), (*shift)[2].data(), (*shift)[3].data()};
  return {a};
}

int64_t group_by_row_(Ids ids, int64_t num_rows, Array<int32_t, 1> order, Array<int64_t, 1> starts, Array<int64_t, 1> rows,
                      int threads) {
  const int64_t count = (int64_t)ids.size();
  require(count < (int64_t)1 << 31 && num_rows < (int64_t)1 << 31, "at most 2^31 - 1 entries and rows");
  require((int64_t)order.size() == count && (int64_t)starts.size() == count + 1 && (int64_t)rows.size() == count,
          "order, starts and rows need count, count + 1 and count elements");
  count_holes(ids.data(), count, num_rows);
  nb::gil_scoped_release released;
  uint32_t* const entries = reinterpret_cast<uint32_t*>(order.data());
  return group_by_row(ids.data(), count, num_rows, entries, starts.data(), rows.data(), threads);
}

int64_t stale_rows_(Array<const int32_t, 1> weights_step, std::optional<Array<const int64_t, 1>> ids, int32_t now, int threads,
                     Array<int64_t, 1> found) {
  const int64_t num_rows = (int64_t)weights_step.size(), count = ids ? (int64_t)ids->size() : num_rows;
  require((int64_t)found.size() == count, "found needs an element for each row that is asked for");
  if (count == 0) return 0;  // an empty array may have no address, which would ask for all rows
  if (ids) count_holes(ids->data(), count, num_rows);
  nb::gil_scoped_release released;
  return stale_rows(weights_step.data(), num_rows, ids ? ids->data() : nullptr, count, now, threads, found.data());
}

void fit_rules_(Array<const double, 2> a, Array<const double, 2> c, double tolerance, Array<const double, 1> spreads, int num_probes,
                int threads, Array<int32_t, 1> num_nodes, Array<double, 2> weights, Array<double, 2> nodes) {
  const size_t count = a.shape(0);
  require(a.shape(1) > 0 && c.shape(0) == count && c.shape(1) == a.shape(1) && spreads.size() == MAX_RULE_NODES - 1 &&
              num_probes > 1 && num_nodes.size() == count && weights.shape(0) == count && nodes.shape(0) == count &&
              weights.shape(1) == MAX_RULE_NODES && nodes.shape(1) == MAX_RULE_NODES,
          "terms and rules do not fit");
  nb::gil_scoped_release released;
  fit_rules({a.data(), c.data(), (int64_t)count, (int64_t)a.shape(1), tolerance, spreads.data(), num_probes, threads,
             num_nodes.data(), weights.data(), nodes.data()});
}

RowGradientArgs row_gradient_args(const Array<const int32_t, 1>& order, const Array<const int64_t, 1>& starts,
                                  const Array<const int64_t, 1>& rows, const std::optional<Array<In, 2>>& x,
                                  const Array<In, 2>& grad_y, const Array<In, 3>& coefficients, int threads) {
  const RowGradientArgs a{
      {reinterpret_cast<const uint32_t*>(order.data()), starts.data(), rows.data(), (int64_t)rows.size()},
      data_or_null(x),
      grad_y.data(),
      coefficients.data(),
      (int64_t)coefficients.shape(1),
      (int64_t)coefficients.shape(2),
      (int64_t)grad_y.shape(1),
      threads,
      false,
      nullptr};
  require(order.size() == coefficients.shape(0) * coefficients.shape(1) && starts.size() > rows.size() &&
              coefficients.shape(0) == grad_y.shape(0),
          "groups and coefficients do not fit");
  require(x ? x->size() == grad_y.size() : a.parts == 1, "experts need x like grad_y");
  return a;
}

void row_gradients_(Array<const int32_t, 1> order, Array<const int64_t, 1> starts, Array<const int64_t, 1> rows,
                    std::optional<Array<In, 2>> x, Array<In, 2> grad_y, Array<In, 3> coefficients, int threads,
                    bool compact, Array<float, 3> grad_rows) {
  RowGradientArgs a = row_gradient_args(order, starts, rows, x, grad_y, coefficients, threads);
  a.compact = compact;
  a.grad_rows = grad_rows.data();
  require((int64_t)grad_rows.shape(1) == a.parts && (int64_t)grad_rows.shape(2) == a.dim &&
              (!compact || grad_rows.shape(0) == rows.size()),
          "grad_rows must be (rows, parts, D)");
  if (!compact) check_ids(rows.data(), (int64_t)rows.size(), (int64_t)grad_rows.shape(0));
  nb::gil_scoped_release released;
  kernels().row_gradients(a);
}

using AnyRows = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Steps = std::optional<Array<int32_t, 1>>;

template <class AnyArray>
bool is_bf16(const AnyArray& array) {
  if (array.dtype().code == (uint8_t)nb::dlpack::dtype_code::Bfloat) return true;
  require(array.dtype() == nb::dtype<float>(), "rows, moments and gradients must be float32 or bfloat16");
  return false;
}

using Numbers = std::optional<Array<const int64_t, 1>>;

// A table of rows (N, len) with its moments: exp_avg (N, len) or null, exp_avg_sq (N, len), or (N, R), one for each run of
// len / R weights. Where these rows are a part of a table's: `firsts`, numbers at which rows begin that lie one after another in
// the whole, the first of them 0, and `shifts`, what turns these numbers into the whole's; `columns`, the first column of each
// of as many equal runs of a row's weights.
struct RowState {
  AnyRows rows;
  std::optional<AnyRows> exp_avg;
  AnyRows exp_avg_sq;
  Steps moments_step, weights_step;
  std::optional<Array<float, 2>> scales;  // (N, parts) of rows in int8, or float8 given as uint8
  Numbers firsts, shifts, columns;

  RowState(AnyRows rows, std::optional<AnyRows> exp_avg, AnyRows exp_avg_sq, Steps moments_step, Steps weights_step,
           std::optional<Array<float, 2>> scales, Numbers firsts, Numbers shifts, Numbers columns)
      : rows(rows),
        exp_avg(exp_avg),
        exp_avg_sq(exp_avg_sq),
        moments_step(moments_step),
        weights_step(weights_step),
        scales(scales),
        firsts(firsts),
        shifts(shifts),
        columns(columns) {}

  TrainedFormat format() const {
    if (!scales) return is_bf16(rows) ? TrainedFormat::bf16 : TrainedFormat::f32;
    require(scales->shape(0) == rows.shape(0) && scales->shape(1) && rows.shape(1) % scales->shape(1) == 0,
            "scales must be (N, parts)");
    require(!exp_avg || !weights_step, "rows of 8 bits cannot catch up with a first moment");
    if (rows.dtype() == nb::dtype<int8_t>()) return TrainedFormat::i8;
    require(rows.dtype() == nb::dtype<uint8_t>(), "rows with scales must be int8, or float8 given as uint8");
    return TrainedFormat::f8;
  }

  RowAdamWTable table() const {
    const size_t second_moments = exp_avg_sq.shape(1);
    const bool row_wise = second_moments != rows.shape(1);
    const size_t count = rows.shape(0);
    const int64_t runs = columns ? (int64_t)columns->size() : row_wise ? (int64_t)second_moments : 1;
    require(runs > 0 && (int64_t)rows.shape(1) % runs == 0 && (!row_wise || (int64_t)second_moments == runs),
            "runs of a row's weights, their columns and second moments do not fit");
    require(!firsts == !shifts && (!firsts || (firsts->size() > 0 && firsts->size() == shifts->size() && firsts->data()[0] == 0)),
            "firsts and shifts do not fit");
    require(exp_avg_sq.shape(0) == count &&
                (!exp_avg || exp_avg->size() == rows.size()) && (!moments_step || moments_step->size() == count) &&
                (!weights_step || weights_step->size() == count),
            "rows, moments and steps do not fit");
    const bool bf16_moments = exp_avg ? is_bf16(*exp_avg) : !row_wise && is_bf16(exp_avg_sq);
    require(row_wise ? !is_bf16(exp_avg_sq) : is_bf16(exp_avg_sq) == bf16_moments, "moments must have one dtype");
    return {rows.data(),
            data_or_null(scales),
            exp_avg ? exp_avg->data() : nullptr,
            exp_avg_sq.data(),
            moments_step ? moments_step->data() : nullptr,
            weights_step ? weights_step->data() : nullptr,
            (int64_t)count,
            (int64_t)rows.shape(1),
            scales ? (int64_t)scales->shape(1) : 1,
            format(),
            bf16_moments,
            row_wise,
            (int64_t)rows.shape(1) / runs,
            data_or_null(columns),
            data_or_null(firsts),
            data_or_null(shifts),
            firsts ? (int64_t)firsts->size() : 0};
  }
};

RowAdamWStep step_of(int32_t number, double learning_rate, double weight_decay, double beta1, double beta2, double eps,
                     std::optional<uint32_t> seed) {
  return {number, learning_rate, weight_decay, beta1, beta2, eps, seed.has_value(), seed.value_or(0)};
}

void update_rows_(const RowState& state, Array<const int64_t, 1> ids, AnyRows gradient, const RowAdamWStep& step,
                  int threads) {
  const RowAdamWTable table = state.table();
  require(gradient.shape(0) == ids.size() && (int64_t)gradient.shape(1) == table.len, "gradient must be (U, len)");
  const bool bf16_gradient = is_bf16(gradient);
  check_ids(ids.data(), (int64_t)ids.size(), table.num_rows);
  nb::gil_scoped_release released;
  kernels().row_adamw.update_rows(table, ids.data(), (int64_t)ids.size(), gradient.data(), bf16_gradient, step, threads);
}

void catch_up_rows_(const RowState& state, Array<const int64_t, 1> ids, int32_t first_step, Array<const int32_t, 1> index,
                    Array<const double, 1> decay, Array<const int32_t, 1> num_nodes, Array<const double, 2> weights,
                    Array<const double, 2> nodes, const RowAdamWStep& step, int threads) {
  const RowAdamWTable table = state.table();
  const RowCatchUpRules rules{first_step,     index.data(), decay.data(), num_nodes.data(),
                              weights.data(), nodes.data(), (int64_t)weights.shape(1)};
  require(table.weights_step && table.moments_step, "rows catch up by their steps");
  require(num_nodes.size() == decay.size() && weights.shape(0) == decay.size() && nodes.size() == weights.size() &&
              weights.shape(1) <= 8,
          "the rules do not fit");
  check_ids(ids.data(), (int64_t)ids.size(), table.num_rows);
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t since = table.weights_step[ids.data()[i]];
    const int64_t place = since - first_step;
    require(since >= step.step || (place >= 0 && place < (int64_t)index.size() && index.data()[place] >= 0 &&
                                   index.data()[place] < (int64_t)decay.size()),
            "a row's step has no rule");
  }
  nb::gil_scoped_release released;
  kernels().row_adamw.catch_up_rows(table, ids.data(), (int64_t)ids.size(), rules, step, threads);
}

void update_by_row_gradients_(Array<const int32_t, 1> order, Array<const int64_t, 1> starts, Array<const int64_t, 1> rows,
                              std::optional<Array<In, 2>> x, Array<In, 2> grad_y, Array<In, 3> coefficients,
                              const RowState& state, const RowAdamWStep& step, int threads) {
  const RowAdamWTable table = state.table();
  const RowGradientArgs a = row_gradient_args(order, starts, rows, x, grad_y, coefficients, threads);
  require(a.parts * a.dim == table.len, "rows must be (N, parts * D)");
  check_ids(rows.data(), (int64_t)rows.size(), table.num_rows);
  nb::gil_scoped_release released;
  kernels().update_by_row_gradients(a, table, step);
}

// Ask for huge pages under the whole pages of an array, whether it was touched or not.
bool use_huge_pages_(nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> array) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = ((uintptr_t)array.data() + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = ((uintptr_t)array.data() + array.nbytes()) / PAGE * PAGE;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)array;
  return false;
#endif
}

// An uninitialised tensor in a block that is kept for the next one when it dies.
nb::ndarray<nb::pytorch, float, nb::ndim<3>> recycled_(size_t rows, size_t parts, size_t dim) {
  Block* const block = new Block(take_block(rows * parts * dim * sizeof(float)));
  const nb::capsule owner(block, [](void* held) noexcept {
    Block* const dying = static_cast<Block*>(held);
    give_back(*dying);
    delete dying;
  });
  return {block->data, {rows, parts, dim}, owner};
}

// The bytes of `from` to the start of `to`; what is left of `from` is not to be read.
void move_bytes_(Array<uint8_t, 1> from, Array<uint8_t, 1> to, int threads) {
  require(from.size() <= to.size(), "there is less room than bytes");
  nb::gil_scoped_release released;
  move_bytes(from.data(), to.data(), from.size(), threads);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of peerlm; peerlm.ops.cpu is their only user.";
  m.def("target", [] { return std::string(kernels().name); });
  m.def("runnable_targets", [] { return std::string(runnable_targets()); });
  m.def("has_scores", [](const std::string& scores) { return has_scores(kernels(), scores_of(scores)); });
  m.def("retrieve", &retrieve_);
  m.def("retrieve_backward", &retrieve_backward_, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
  m.def("mix", &mix_, nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg());
  m.def("mix_backward", &mix_backward_, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none());
  m.attr("calls") = 2;  // of layers and attention: changes with their arguments, as in native.py
  nb::class_<WholeLayer>(m, "WholeLayer").def("run", &WholeLayer::run);
  m.def("whole_layer", &whole_layer_, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  nb::class_<DenseLayer>(m, "DenseLayer").def("run", &DenseLayer::run);
  m.def("dense_layer", &dense_layer_, nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
  nb::class_<Norm>(m, "Norm").def("run", &Norm::run);
  m.def("norm", &norm_);
  nb::class_<AttentionStep>(m, "AttentionStep").def("run", &AttentionStep::run);
  m.def("attention_step", &attention_step_, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  nb::class_<Blocks>(m, "Blocks").def("run", &Blocks::run);
  m.def("blocks", &blocks_);
  m.def("group_by_row", &group_by_row_);
  m.def("stale_rows", &stale_rows_, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
  m.def("fit_rules", &fit_rules_);
  m.def("row_gradients", &row_gradients_, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg());
  nb::class_<RowState>(m, "RowState")
      .def(nb::init<AnyRows, std::optional<AnyRows>, AnyRows, Steps, Steps, std::optional<Array<float, 2>>, Numbers, Numbers, Numbers>(),
           nb::arg("rows"), nb::arg("exp_avg").none(), nb::arg("exp_avg_sq"), nb::arg("moments_step").none(),
           nb::arg("weights_step").none(), nb::arg("scales") = nb::none(), nb::arg("firsts") = nb::none(),
           nb::arg("shifts") = nb::none(), nb::arg("columns") = nb::none());
  nb::class_<RowAdamWStep>(m, "RowAdamWStep");
  m.def("row_adamw_step", &step_of, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  m.def("update_rows", &update_rows_);
  m.def("catch_up_rows", &catch_up_rows_);
  m.def("update_by_row_gradients", &update_by_row_gradients_, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("move_bytes", &move_bytes_);
  m.def("recycled", &recycled_);
  m.def("use_huge_pages", &use_huge_pages_);
}
