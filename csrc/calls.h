// What a call of each family consists of besides its tensors. kdkernels/_calls.py has the same fields
// in the same order, of which the operators' schemas are made; `numbers` are all floats in one list.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace kdkernels {

using Numbers = std::vector<double>;

inline void expect_numbers(const Numbers& numbers, size_t least, size_t most) {
  if (numbers.size() < least || numbers.size() > most)
    throw std::invalid_argument("numbers must be " + std::to_string(least) + " to " +
                                std::to_string(most) + ", got " + std::to_string(numbers.size()));
}

struct RowCall {
  std::string rule;
  Numbers numbers;  // temperature, scale, weight of the cross-entropy, then the rule's own options
  bool standardize, parts;
  int64_t ignore_index, class_dim, reduction;

  static constexpr size_t kOptions = sizeof(Options::value) / sizeof(double);

  // Everything but the tensors; the scales not yet divided by the rows.
  void fill(RowProblem& problem) const {
    expect_numbers(numbers, 3, 3 + kOptions);
    problem.temperature = numbers[0];
    problem.scale = numbers[1];
    problem.hard = numbers[2];
    problem.standardize = standardize;
    problem.ignore_index = ignore_index;
    for (size_t i = 3; i < numbers.size(); ++i) problem.options.value[i - 3] = numbers[i];
  }
};

struct CorrelationCall {
  std::string rule;
  Numbers numbers;  // inter, intra, tau, eps
  int64_t class_dim, reduction;

  void fill(CorrelationProblem& problem) const {
    expect_numbers(numbers, 4, 4);
    problem.inter = numbers[0];
    problem.intra = numbers[1];
    problem.tau = numbers[2];
    problem.eps = numbers[3];
  }
};

struct FactorCall {
  Numbers numbers;  // inheritance_weight, exploration_weight
  bool cosine;
  int64_t reduction;

  void fill(FactorProblem& problem) const {
    expect_numbers(numbers, 2, 2);
    problem.inheritance_weight = numbers[0];
    problem.exploration_weight = numbers[1];
    problem.cosine = cosine;
  }
};

struct TupleCall {
  Numbers numbers;  // margin, temperature, scale
  int64_t reduction;

  double scale() const { return numbers[2]; }
  void fill(TupleProblem& problem) const {
    expect_numbers(numbers, 3, 3);
    problem.margin = numbers[0];
    problem.temperature = numbers[1];
  }
};

struct TopKCall {
  Numbers numbers;  // temperature
  bool wide, rest, hard, entropy;
  int64_t ignore_index;

  void fill(TopKProblem& problem) const {
    expect_numbers(numbers, 1, 1);
    problem.temperature = numbers[0];
    problem.rest = rest;
    problem.hard = hard;
    problem.entropy = entropy;
    problem.ignore_index = ignore_index;
  }
};

}  // namespace kdkernels
