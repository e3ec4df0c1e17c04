// Losses and their derivatives by the log-prob, in double: what align_kernels/losses defines, derived by hand as autograd
// derives it (half of a minimum's gradient to each side of a tie, a clamp's gradient inside its limits and on them).
#pragma once
#include "portable.h"
#include "tile.h"

namespace align_cuda {

// -- tokens ----------------------------------------------------------------------------------------------------------
struct Coefficient {
  double value, g, g_entropy;  // a token's loss, d/dlogp, d/dentropy
  double metrics[4];
};

// losses/common.py: exp(x), beyond `limit` its tangent, and the derivative.
struct BoundedExp {
  double value, slope;
};

ALIGN_FN BoundedExp bounded_exp(double x) {
  constexpr double kLimit = 20;
  const double e = exp(x > kLimit ? kLimit : x), beyond = 1 + (x > kLimit ? x - kLimit : 0);
  return {e * beyond, (x > kLimit ? 0 : e * beyond) + (x < kLimit ? 0 : e)};
}

ALIGN_FN double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// losses/ppo.py: -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A) and its derivative by r.
struct Surrogate {
  double value, slope;
};

ALIGN_FN Surrogate clip_surrogate(const TokenLoss& loss, double ratio, double advantage) {
  const double low = 1 - loss.epsilon_low, high = 1 + loss.epsilon_high;
  const double free = (ratio > loss.delta ? loss.delta : ratio) * advantage;
  const double clipped = clip(ratio, low, high) * advantage;
  const double to_free = free == clipped ? 0.5 : free > clipped ? 0.0 : 1.0;
  const double to_clipped = free == clipped ? 0.5 : clipped > free ? 0.0 : 1.0;
  const bool inside = ratio >= low && ratio <= high;
  const double share = (ratio > loss.delta ? 0.0 : to_free) + (inside ? to_clipped : 0.0);
  return {-(free > clipped ? clipped : free), -advantage * share};
}

// losses/ppo.py, arXiv:1707.06347 eq. 7 and 9
ALIGN_FN Coefficient ppo_clip(const TokenLoss& loss, int64_t row, double logp, double entropy) {
  const double log_ratio = logp - loss.old_logps[row], advantage = loss.advantages[row];
  const BoundedExp ratio = bounded_exp(log_ratio);
  const Surrogate s = clip_surrogate(loss, ratio.value, advantage);
  const double clipped = clip(ratio.value, 1 - loss.epsilon_low, 1 + loss.epsilon_high) * advantage;
  return {s.value - loss.entropy_coef * entropy,
          s.slope * ratio.slope,
          -loss.entropy_coef,
          {0.5 * log_ratio * log_ratio, clipped < ratio.value * advantage ? 1.0 : 0.0, ratio.value, 0}};
}

// losses/grpo.py with the term `clip` and one ratio per token, arXiv:2402.03300 eq. 3 and 4
ALIGN_FN Coefficient grpo(const TokenLoss& loss, int64_t row, double logp) {
  const double advantage = loss.advantages[row], weight = loss.weights[row];
  const BoundedExp ratio = bounded_exp(loss.on_policy ? 0.0 : logp - loss.old_logps[row]);
  const Surrogate s = clip_surrogate(loss, ratio.value, advantage);
  double value = s.value, g = s.slope * ratio.slope, kl = 0;
  if (loss.beta != 0) {
    const double d = loss.ref_logps[row] - logp;
    const BoundedExp e = bounded_exp(d);
    const double by = loss.kl_by_ratio ? ratio.value : 1, slope = loss.kl_by_ratio ? ratio.slope : 0;
    g += loss.beta * ((1 - e.slope) * by + (e.value - 1 - d) * slope);
    kl = (e.value - 1 - d) * by;
    value += loss.beta * kl;
  }
  const bool below = ratio.value < 1 - loss.epsilon_low && advantage < 0;
  const bool above = ratio.value > 1 + loss.epsilon_high && advantage > 0;
  return {weight * value, weight * g, 0, {kl, double(below), double(above), double(below || above)}};
}

ALIGN_FN Coefficient token_coefficient(const TokenLoss& loss, int64_t row, double logp, double entropy) {
  if (loss.kind == Token::ppo_clip) return ppo_clip(loss, row, logp, entropy);
  if (loss.kind == Token::grpo) return grpo(loss, row, logp);
  return {-logp, -1, 0, {0, 0, 0, 0}};
}

// -- pairs and sequences ---------------------------------------------------------------------------------------------
// Sums over the rows of a unit; of a sequence the first half alone.
struct UnitSums {
  double chosen, rejected;
  double chosen_rows, rejected_rows;
};

struct UnitCoefficient {
  double value, chosen, rejected;  // the unit's loss and its derivative by a log-prob of either half
  double metrics[4];
};

ALIGN_FN double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }
ALIGN_FN double log_sigmoid(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }

// losses/dpo.py: sigmoid, robust, hinge and ipo with its mean over tokens
ALIGN_FN UnitCoefficient dpo(const UnitLoss& loss, int64_t pair, const UnitSums& sums) {
  const double chosen = sums.chosen - loss.ref_logps[pair];
  const double rejected = sums.rejected - loss.ref_logps[loss.units + pair];
  const double beta = loss.beta, e = loss.label_smoothing, z = beta * (chosen - rejected);
  const double rows_c = sums.chosen_rows > 1 ? sums.chosen_rows : 1, rows_r = sums.rejected_rows > 1 ? sums.rejected_rows : 1;
  double value, dz, by_rows_c = beta, by_rows_r = beta;
  if (loss.kind == Unit::dpo_sigmoid) {
    value = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z);
    dz = -(1 - e) * sigmoid(-z) + e * sigmoid(z);
  } else if (loss.kind == Unit::dpo_robust) {
    value = (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e);
    dz = (-(1 - e) * sigmoid(-z) - e * sigmoid(z)) / (1 - 2 * e);
  } else if (loss.kind == Unit::dpo_hinge) {
    value = 1 - z < 0 ? 0 : 1 - z;
    dz = 1 - z > 0 ? -1 : 0;
  } else {
    const double gap = chosen / rows_c - rejected / rows_r - 1 / (2 * beta);
    value = gap * gap;
    dz = 2 * gap, by_rows_c = 1 / rows_c, by_rows_r = 1 / rows_r;
  }
  const double good = beta * chosen, bad = beta * rejected;
  return {value, dz * by_rows_c, -dz * by_rows_r, {good, bad, good > bad ? 1.0 : 0.0, good - bad}};
}

// losses/kto.py, arXiv:2402.01306 eq. 8
ALIGN_FN UnitCoefficient kto(const UnitLoss& loss, int64_t sequence, const UnitSums& sums) {
  const double z = loss.beta * (sums.chosen - loss.ref_logps[sequence] - (loss.kl ? loss.kl[sequence] : 0.0f));
  const double sign = loss.desirable[sequence] ? 1 : -1;
  const double weight = loss.desirable[sequence] ? loss.desirable_weight : loss.undesirable_weight;
  return {weight * sigmoid(-sign * z), -sign * weight * sigmoid(z) * sigmoid(-z) * loss.beta, 0, {0, 0, 0, 0}};
}

ALIGN_FN UnitCoefficient unit_coefficient(const UnitLoss& loss, int64_t unit, const UnitSums& sums) {
  return loss.kind == Unit::kto ? kto(loss, unit, sums) : dpo(loss, unit, sums);
}

}  // namespace align_cuda
