// Cross-entropy of class indices: the inputs of its kernels, checked alike on every device.
#pragma once

#include "checks.h"

namespace fused_ops {

inline bool is_mean(const std::string& reduction) { return reduction == "mean"; }
inline bool is_per_row(const std::string& reduction) { return reduction == "none"; }

// Rows of logits, their targets and the class weights, contiguous.
struct Rows {
  Tensor logits, target;
  std::optional<Tensor> weight;
  int64_t N, C, ignore_index;

  Rows(const Tensor& logits_, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t ignore_index_)
      : logits(torch::stable::contiguous(logits_)),
        target(torch::stable::contiguous(target_)),
        weight(contiguous(weight_)),
        ignore_index(ignore_index_) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits should be (N, C)");
    N = logits.size(0);
    C = logits.size(1);
    check_vector(target, N, ScalarType::Long, "target");
    check_same_device(target, logits, "target");
    if (weight) {
      check_vector(*weight, C, logits.scalar_type(), "weight");
      check_same_device(*weight, logits, "weight");
    }
  }
};

// What comes back to the loss, and what its forward pass saved.
struct RowGradients {
  Tensor dlosses, stats, weight_sum;

  RowGradients(const Rows& rows, const Tensor& dloss, const Tensor& stats_, const Tensor& weight_sum_, bool per_row)
      : dlosses(torch::stable::contiguous(torch::stable::to(dloss, accumulate_type(rows.logits.scalar_type())))),
        stats(torch::stable::contiguous(stats_)),
        weight_sum(weight_sum_) {
    const auto type = accumulate_type(rows.logits.scalar_type());
    STD_TORCH_CHECK(dlosses.numel() == (per_row ? rows.N : 1), "dloss should have an element for each loss");
    STD_TORCH_CHECK(stats.numel() == 2 * rows.N && stats.scalar_type() == type, "stats should be (2, N)");
    STD_TORCH_CHECK(weight_sum.numel() == 1 && weight_sum.scalar_type() == type, "weight_sum should be a scalar");
    check_same_device(dlosses, rows.logits, "dloss");
    check_same_device(stats, rows.logits, "stats");
    check_same_device(weight_sum, rows.logits, "weight_sum");
  }
};

}  // namespace fused_ops
