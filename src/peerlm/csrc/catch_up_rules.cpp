// A few fractions in place of the many steps that a stale row has missed: Gauss rules, one for each distinct step.
// optim/catch_up.py is the definition, with the reasons; sums are taken in order, so that no rule depends on another.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"

namespace peerlm {

namespace {

constexpr int MAX_NODES = MAX_RULE_NODES;
constexpr int SWEEPS = 30;  // of Jacobi rotations; matrices this small take five
constexpr int LANES = 8;    // sums side by side, in the same order on every machine
constexpr double NEGLIGIBLE = 1e-14;

struct Rule {
  double weights[MAX_NODES], nodes[MAX_NODES];
};

struct Sum {
  const double *a, *c;
  int64_t terms;
};

struct Work {
  std::vector<double> measure, basis, left;

  explicit Work(int64_t terms) : measure(terms), basis(MAX_NODES * terms), left(terms) {}
};

double dot(const double* x, const double* y, int64_t n) {
  double sums[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += x[i + lane] * y[i + lane];
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += x[i] * y[i];
  double sum = 0;
  for (const double each : sums) sum += each;
  return sum;
}

// The c below which 0.9999 of the mass a c lies.
double upper_end(const Sum& sum) {
  const double enough = 0.9999 * dot(sum.a, sum.c, sum.terms);
  double mass = 0;
  for (int64_t k = 0; k < sum.terms; ++k) {
    mass += sum.a[k] * sum.c[k];
    if (!(mass < enough)) return sum.c[k];
  }
  return sum.c[sum.terms - 1];
}

// Eigenvalues of a symmetric matrix, ascending, and the first entry of each eigenvector, by Jacobi's rotations.
void eigen(int n, double m[MAX_NODES][MAX_NODES], double* values, double* first) {
  for (int i = 0; i < n; ++i) first[i] = i == 0;
  for (int sweep = 0; sweep < SWEEPS; ++sweep) {
    double off = 0, on = 0;
    for (int i = 0; i < n; ++i) {
      on += m[i][i] * m[i][i];
      for (int j = 0; j < i; ++j) off += m[i][j] * m[i][j];
    }
    if (!(off > 1e-36 * on)) break;
    for (int p = 0; p < n; ++p)
      for (int q = p + 1; q < n; ++q) {
        if (m[p][q] == 0) continue;
        const double theta = (m[q][q] - m[p][p]) / (2 * m[p][q]);
        const double tangent = std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        const double cosine = 1 / std::sqrt(tangent * tangent + 1), sine = tangent * cosine;
        for (int i = 0; i < n; ++i) {
          const double ip = m[i][p], iq = m[i][q];
          m[i][p] = cosine * ip - sine * iq;
          m[i][q] = sine * ip + cosine * iq;
        }
        for (int i = 0; i < n; ++i) {
          const double pi = m[p][i], qi = m[q][i];
          m[p][i] = cosine * pi - sine * qi;
          m[q][i] = sine * pi + cosine * qi;
        }
        const double fp = first[p], fq = first[q];
        first[p] = cosine * fp - sine * fq;
        first[q] = sine * fp + cosine * fq;
      }
  }
  for (int i = 0; i < n; ++i) {  // by insertion
    int at = i;
    const double value = m[i][i], entry = first[i];
    for (; at > 0 && values[at - 1] > value; --at) {
      values[at] = values[at - 1];
      first[at] = first[at - 1];
    }
    values[at] = value;
    first[at] = entry;
  }
}

// Gauss's rule for the measure a c / product of (c + points), its weights multiplied by that product again.
Rule gauss_rule(const Sum& sum, double high, int num_nodes, Work& work) {
  const int64_t terms = sum.terms;
  const double low = sum.c[0], scale = 1 / low;
  const int num_points = 2 * num_nodes - 2;
  double points[2 * MAX_NODES - 1] = {0};
  for (int i = 0; i < num_points; ++i) points[1 + i] = low * std::pow(high / low, (double)i / (num_points - 1));
  const auto product = [&](double x) {
    double all = 1;
    for (int i = 0; i <= num_points; ++i) all *= (x + points[i]) * scale;
    return all;
  };
  double mass = 0;
  for (int64_t k = 0; k < terms; ++k) mass += work.measure[k] = sum.a[k] * sum.c[k] / product(sum.c[k]);
  double* const basis = work.basis.data();
  double* const left = work.left.data();
  for (int64_t k = 0; k < terms; ++k)
    basis[k] = std::sqrt(work.measure[k] / std::max(mass, std::numeric_limits<double>::min()));
  double matrix[MAX_NODES][MAX_NODES] = {{0}};
  for (int j = 0; j < num_nodes; ++j) {
    const double* const last = basis + j * terms;
    for (int64_t k = 0; k < terms; ++k) left[k] = sum.c[k] * last[k];
    matrix[j][j] = dot(left, last, terms);
    if (j + 1 == num_nodes) break;
    for (int again = 0; again < 2; ++again) {  // once more, against rounding: nodes may lie close together
      double overlap[MAX_NODES];
      for (int i = 0; i <= j; ++i) overlap[i] = dot(basis + i * terms, left, terms);
      for (int i = 0; i <= j; ++i)
        for (int64_t k = 0; k < terms; ++k) left[k] -= overlap[i] * basis[i * terms + k];
    }
    double norm = std::sqrt(dot(left, left, terms));
    if (!(norm > NEGLIGIBLE * matrix[j][j])) norm = 0;  // no more points than nodes: a node of its own, without weight
    matrix[j][j + 1] = matrix[j + 1][j] = norm;
    for (int64_t k = 0; k < terms; ++k) basis[(j + 1) * terms + k] = norm > 0 ? left[k] / norm : 0;
  }
  double nodes[MAX_NODES], first[MAX_NODES];
  eigen(num_nodes, matrix, nodes, first);
  Rule rule;
  for (int j = 0; j < MAX_NODES; ++j) {
    const bool empty = j >= num_nodes || nodes[j] < 0.5 * low;
    rule.weights[j] = empty ? 0 : first[j] * first[j] * mass * product(nodes[j]);
    rule.nodes[j] = j >= num_nodes ? 1 : empty ? low : nodes[j];
  }
  return rule;
}

// r at which rules are tried, and the sum itself there.
struct Probes {
  std::vector<double> at, value;

  Probes(const Sum& sum, double high, int count) : at(count), value(count, 0.0) {
    const double low = sum.c[0];
    for (int i = 0; i < count; ++i) at[i] = low * std::pow(2 * high / low, -0.5 + 2.0 * i / (count - 1));
    for (int64_t k = 0; k < sum.terms; ++k) {
      const double mass = sum.a[k] * sum.c[k], c = sum.c[k];
      for (int i = 0; i < count; ++i) value[i] += mass / (at[i] + c);
    }
  }

  bool met_by(const Rule& rule, int num_nodes, double tolerance) const {
    for (size_t i = 0; i < at.size(); ++i) {
      double found = 0;
      for (int j = 0; j < num_nodes; ++j) found += rule.weights[j] / (at[i] + rule.nodes[j]);
      const double error = std::fabs(found - value[i]);
      if (!(error == 0 || error / value[i] <= tolerance)) return false;  // NaN meets none
    }
    return true;
  }
};

}  // namespace

void fit_rules(const RuleArgs& args) {
#pragma omp parallel num_threads(args.threads)
  {
    Work work(args.terms);
#pragma omp for schedule(dynamic, 4)
    for (int64_t s = 0; s < args.count; ++s) {
      const Sum sum{args.a + s * args.terms, args.c + s * args.terms, args.terms};
      const double high = upper_end(sum);
      const Probes probes(sum, high, args.num_probes);
      const double* const spreads_end = args.spreads + MAX_NODES - 1;
      int num_nodes = 1 + (int)(std::lower_bound(args.spreads, spreads_end, high / sum.c[0]) - args.spreads);
      Rule rule = gauss_rule(sum, high, num_nodes, work);
      while (num_nodes < MAX_NODES && !probes.met_by(rule, num_nodes, args.tolerance))
        rule = gauss_rule(sum, high, ++num_nodes, work);
      args.num_nodes[s] = num_nodes;
      std::copy_n(rule.weights, MAX_NODES, args.weights + s * MAX_NODES);
      std::copy_n(rule.nodes, MAX_NODES, args.nodes + s * MAX_NODES);
    }
  }
}

}  // namespace peerlm
