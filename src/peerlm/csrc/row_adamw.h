// AdamW on chosen rows of a table, in plain C++: what optim/row_step.py defines, for tables in float, bfloat16 or 8 bits.
//
// Arrays are contiguous and row-major. A table has N rows of `len` weights; a call works on `count` distinct rows `ids`.

#pragma once

#include <cstdint>

namespace peerlm {

// What rows are stored as; the last two are numbers that a scale for each vector multiplies.
enum class TrainedFormat { f32, bf16, i8, f8 };

// A table and what AdamW remembers of its rows (RowState in ops/row_updates.py).
struct RowAdamWTable {
  void* rows;             // (N, len)
  float* scales;          // (N, parts) of rows in 8 bits, each vector len / parts long; null for others
  void* exp_avg;          // (N, len) float, or bfloat16 where bf16_moments; null without first moment
  void* exp_avg_sq;       // likewise; (N, len / run) float where row_wise
  int32_t* moments_step;  // (N), or null in lazy mode
  int32_t* weights_step;  // (N), or null in lazy mode
  int64_t num_rows, len, parts;
  TrainedFormat format;
  bool bf16_moments, row_wise;
  int64_t run;             // weights of a row that lie in columns one after another; row_wise: which share a second moment
  const int64_t* columns;  // (len / run): the first column of each run; null: r * run
  // Rounding depends on a row's number in the whole table: row + shifts[i] where firsts[i] <= row is the last such; null: row.
  const int64_t *firsts, *shifts;
  int64_t pieces;

  uint32_t name(int64_t row) const {
    int64_t piece = pieces;
    while (piece > 0 && firsts[--piece] > row) {}
    return (uint32_t)(pieces ? row + shifts[piece] : row);
  }
  int64_t column(int64_t r) const { return columns ? columns[r] : r * run; }

  bool scaled() const { return scales; }
};

// The numbers of one step (RowStep in ops/row_updates.py).
struct RowAdamWStep {
  int32_t step;  // counted from 1
  double learning_rate, weight_decay, beta1, beta2, eps;
  bool stochastic_rounding;
  uint32_t seed;
};

// How rows last right at a step become right now (CatchUpRules in optim/catch_up.py).
struct RowCatchUpRules {
  int32_t first_step;
  const int32_t* index;      // entry s - first_step is the number of the rule for step s
  const double* decay;       // one per rule
  const int32_t* num_nodes;  // one per rule, at most max_nodes
  const double* weights;     // max_nodes per rule
  const double* nodes;       // max_nodes per rule
  int64_t max_nodes;         // at most 8
};

// Ids must be in 0 .. N - 1.
struct RowAdamWKernels {
  // Gradient number i, float or bfloat16, is that of row ids[i].
  void (*update_rows)(const RowAdamWTable&, const int64_t* ids, int64_t count, const void* gradient, bool bf16_gradient,
                      const RowAdamWStep&, int threads);
  // Each row's weights_step must have a rule.
  void (*catch_up_rows)(const RowAdamWTable&, const int64_t* ids, int64_t count, const RowCatchUpRules&, const RowAdamWStep&,
                        int threads);
};

}  // namespace peerlm
