// What the native kernels are, in plain C++: arguments as structs of pointers and sizes, kernels as a table of functions.
//
// Every SIMD target compiles the same sources (target.inc) and fills one table; dispatch.cpp chooses a table at run time.
// Arrays are contiguous and row-major. Symbols as in ops/reference.py: T tokens, H heads, n sub-keys per half,
// C = key_dim / 2 features per half, K experts per head, P = H * K entries per token, N rows, D model width.
// A row holds `parts` vectors of width D: 1 for a memory's value, 2 for an expert (u, v), 3 for a gated one (u, v, g).

#pragma once

#include <cstdint>

#include "row_adamw.h"

namespace peerlm {

// An id that names no row: its entry adds nothing. Rows of other ranks are holes.
constexpr int64_t HOLE = -1;

// Up to here sub-keys are read once, as they are, and one thread is quickest.
constexpr int64_t FEW_TOKENS = 4;

enum class Weighting { softmax, sigmoid, relu, none };
// Which id the expert of sub-keys (i, j) has: see ops/pairing.py.
enum class Pairing { row_major, shells };
enum class Activation { gelu, gelu_tanh, relu, silu, identity, one_plus };
enum class RowFormat { f32, bf16, i8, f8, i4 };  // f8: e4m3fn; i4: see int4 in vec.h
enum class Scores { f32, bf16, i8 };

// Rows of a table; `scales` belongs to i8 and f8, (N, parts), and to i4, (N, parts, dim / 32).
struct Table {
  const void* rows;
  const float* scales;
  RowFormat format;
  int64_t num_rows;
  int64_t parts;
  int64_t dim;
};

struct RetrieveArgs {
  const float* query;     // (T, H, 2, C)
  const float* sub_keys;  // (2, sets, n, C)
  int64_t tokens, heads, sets, n, half_dim, k;  // sets: H, or 1 where heads share sub-keys
  Weighting weighting;
  Pairing pairing;
  Scores scores;  // what sub-keys are compared in first; ids are the same, see retrieve.inc
  int threads;
  float* weights;  // out (T, H, K)
  int64_t* ids;    // out (T, H, K)
  float key_length;  // of a few tokens alone: what sub-keys are normalised to; 0: they stay as they are
};

struct RetrieveBackwardArgs {
  const float* grad_weights;  // (T, H, K)
  const float* weights;       // (T, H, K)
  const int64_t* ids;         // (T, H, K)
  const float* query;
  const float* sub_keys;
  int64_t tokens, heads, sets, n, half_dim, k;
  Weighting weighting;
  Pairing pairing;
  int threads;
  float* grad_query;     // out (T, H, 2, C), or null
  float* grad_sub_keys;  // out (2, sets, n, C), or null
};

struct MixArgs {
  const float* x;        // (T, D); unused by mix_values
  const float* weights;  // (T, P)
  const int64_t* ids;    // (T, P)
  Table table;
  int64_t tokens, per_token;
  const int64_t* starts;  // (T + 1): where each token's entries start, which then need not be P; null: all have P
  Activation activation;
  int threads;
  float* hidden;  // out (T, P, parts - 1): pre-activations u . x and, if gated, g . x; null: not wanted
  float* y;       // out (T, D)
};

struct MixBackwardArgs {
  const float* grad_y;  // (T, D)
  const float* weights;
  const int64_t* ids;
  const float* hidden;  // (T, P, parts - 1), as forward left it
  Table table;
  int64_t tokens, per_token;
  const int64_t* starts;  // as in MixArgs
  Activation activation;
  int threads;
  float* grad_x;        // out (T, D), or null
  float* grad_weights;  // out (T, P), or null
  float* coefficients;  // out (T, P, parts): what multiplies grad_y (for v) and x (for u, g) in a row's gradient, or null
};

// Entries (T * P) sorted by row, equal rows by entry: `order` (T * P), `rows` and `starts` one per row that occurs.
struct Groups {
  const uint32_t* order;
  const int64_t* starts;  // (count + 1)
  const int64_t* rows;    // (count)
  int64_t count;
};

struct RowGradientArgs {
  Groups groups;
  const float* x;             // (T, D); null for parts == 1
  const float* grad_y;        // (T, D)
  const float* coefficients;  // (T, P, parts)
  int64_t per_token, parts, dim;
  int threads;
  bool compact;  // gradient number i is that of row groups.rows[i]; otherwise of row i, and others are left as they are
  float* grad_rows;  // out (count or N, parts, D)
};

// What queries go through before they are compared.
enum class QueryNorm { none, batch, layer };

// A whole layer for at most FEW_TOKENS tokens, without gradients: query, retrieval, mixing.
struct DecodeArgs {
  const float* query_map;  // (H * 2 C, D)
  QueryNorm norm;
  const float *mean, *variance, *weight, *bias;  // of batch, each (H * 2 C); of layer the last two, (2 C)
  float epsilon;
  float weight_scale;
  RetrieveArgs retrieve;  // without query, weights and ids
  MixArgs mix;            // without weights and ids
};

// A dense feed-forward layer without biases, for a few tokens.
struct DenseArgs {
  const float *down, *gate, *up;  // (F, D), (F, D) or null, (D, F)
  int64_t dim, hidden;
  Activation activation;
  const float* x;  // (T, D)
  int64_t tokens;
  int threads;
  float* y;  // out (T, D)
};

// A sum, where something is added, and an RMSNorm of it.
struct NormArgs {
  const float* weight;  // (D)
  float epsilon;
  int64_t rows, dim;
  const float* added;  // (R, D), or null
  float* hidden;       // (R, D); `added` is added in place
  float* y;            // out (R, D)
};

// Keys and values become mixes of their own and those of the slot before: a weight for each of G groups, or all null.
struct ShiftWeights {
  const float *key, *previous_key, *value, *previous_value;
};

// Keys or values of a cache, with strides for rows and heads. With a shift a key has one number more, which is 1 where
// the token before it is in the slot before, else 0.
struct ColumnsOf {
  float* data;
  int64_t row_stride, head_stride;
};

// One new token of each of R sequences through a block's attention: H query heads in G groups, C features each.
struct AttentionStepArgs {
  NormArgs norm;  // before attention; y is the norm after it
  const float* after_weight;  // (D)
  float after_epsilon;
  const float *query_map, *key_map, *value_map, *output_map;  // (H * C, D), (G * C, D) twice, (D, H * C)
  const float *query_norm, *key_norm;                         // (C), or null
  float head_epsilon;
  const float* frequencies;  // (C / 2), of the rotation
  float rotation_scale, scaling;
  int64_t heads, groups, head_dim;
  ShiftWeights shift;
  ColumnsOf keys, values;  // (R, G, columns, C); the last column is written
  int64_t columns;
  const int64_t* mask;       // (R, columns): 0 where a column is hidden; null: none is
  const int64_t* positions;  // (R) with a stride
  int64_t positions_stride;
  int threads;
};

struct Kernels {
  const char* name;
  bool bf16_scores, int8_scores;  // whether there are products for them
  void (*retrieve)(const RetrieveArgs&);
  void (*retrieve_backward)(const RetrieveBackwardArgs&);
  void (*mix_experts)(const MixArgs&);
  void (*mix_experts_backward)(const MixBackwardArgs&);
  void (*mix_values)(const MixArgs&);
  void (*mix_values_backward)(const MixBackwardArgs&);
  void (*row_gradients)(const RowGradientArgs&);
  // Each row's gradient, and at once its AdamW step; grad_rows and compact are not used.
  void (*update_by_row_gradients)(const RowGradientArgs&, const RowAdamWTable&, const RowAdamWStep&);
  void (*decode)(const DecodeArgs&);
  void (*dense)(const DenseArgs&);
  void (*attention_step)(const AttentionStepArgs&);
  void (*add_and_norm)(const NormArgs&);
  RowAdamWKernels row_adamw;
};

// The table in use: the best this machine runs, or the one that PEERLM_SIMD names. Throws std::runtime_error where that
// name is unknown or cannot run here.
const Kernels& kernels();

// Names of the targets that this machine runs, best first, separated by commas.
const char* runnable_targets();

// Sort entries 0 .. count - 1 by ids[entry], stably, into `order`; list each id that occurs and where its entries start, then
// where they end. Returns how many ids occur. `rows` and `starts` have room for count and count + 1. count and num_rows < 2^31,
// ids in 0 .. num_rows - 1, or HOLE, whose entries are left out.
int64_t group_by_row(const int64_t* ids, int64_t count, int64_t num_rows, uint32_t* order, int64_t* starts, int64_t* rows,
                     int threads);

// List the distinct rows among `ids`, or of all where that is null, whose weights_step is before `now`, ascending. Returns how many.
// `found` has room for count, or num_rows; ids in 0 .. num_rows - 1, or HOLE.
int64_t stale_rows(const int32_t* weights_step, int64_t num_rows, const int64_t* ids, int64_t count, int32_t now, int threads,
                    int64_t* found);

constexpr int MAX_RULE_NODES = 8;

// The sums over k of a[s][k] / (r / c[s][k] + 1), c ascending, and room for the Gauss rules that stand for them.
struct RuleArgs {
  const double *a, *c;  // (count, terms)
  int64_t count, terms;
  double tolerance;
  const double* spreads;  // (MAX_RULE_NODES - 1,), ascending: last c over first up to which 1, 2, ... nodes may do
  int num_probes, threads;
  int32_t* num_nodes;       // (count,)
  double *weights, *nodes;  // (count, MAX_RULE_NODES); unused ones are 0 and 1
};

void fit_rules(const RuleArgs& args);

}  // namespace peerlm
