// The activations of gated units, y = act(x), and their derivatives; infinities and NaN give what PyTorch's give.
#pragma once
#include <type_traits>

#include "../glu.h"
#include "simd.h"

namespace pyext {
namespace {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrtTwoPi = 0.39894228040143267794;
constexpr double kTanhScale = 1.59576912160573071176;  // 2 sqrt(2 / pi)
constexpr double kTanhCube = 0.044715;

// x in every lane of a vector like the other one.
INLINE F like(F, double x) { return vset(float(x)); }
INLINE D like(D, double x) { return vset(x); }
template <class V>
INLINE V vabs(V x) {
  return vmax(vsub(like(x, 0), x), x);  // NaN passes through
}

// The standard normal distribution: its density (unless null) and its distribution function. With t = 1 / (1 + 0.4
// |x|), Phi(-|x|) is exp(-x^2 / 2) times a polynomial in t, to 2.5e-8: minimax in the absolute error of the product.
INLINE F normal_distribution(F x, F* density) {
  const F z = vabs(x), bell = vexp(vmul(vmul(x, x), vset(-0.5f)));
  const F t = vdiv(vset(1.f), vfma(vset(0.4f), z, vset(1.f)));
  F p = vfma(vset(5.497067016e-2f), t, vset(-2.490501526e-1f));
  p = vfma(p, t, vset(3.308046749e-1f));
  p = vfma(p, t, vset(2.013257801e-2f));
  p = vfma(p, t, vset(1.860288282e-1f));
  p = vfma(p, t, vset(1.571134260e-1f));
  const F tail = vmul(vmul(p, t), bell);
  if (density) *density = vmul(bell, vset(float(kInvSqrtTwoPi)));
  return select(less(x, vset(0.f)), tail, vsub(vset(1.f), tail));
}
INLINE D normal_distribution(D x, D* density) {
  if (density) *density = by_lane(x, [](double v) { return kInvSqrtTwoPi * __builtin_exp(-0.5 * v * v); });
  return by_lane(x, [](double v) { return 0.5 * __builtin_erfc(-kSqrtHalf * v); });
}

// 1 / (1 + e^-x) and 1 minus that, both without cancellation.
template <class V>
INLINE V sigmoid(V x, V& rest) {
  const V e = vexp(vsub(like(x, 0), vabs(x))), large = vreciprocal(vadd(like(x, 1), e));
  const V small = vmul(e, large);
  const Lanes negative = less(x, like(x, 0));
  rest = select(negative, large, small);
  return select(negative, small, large);
}

template <Activation kind, class V>
INLINE V activate(V x) {
  V rest;
  if constexpr (kind == Activation::geglu) return vmul(x, normal_distribution(x, nullptr));
  if constexpr (kind == Activation::geglu_tanh) {
    const V inner = vmul(x, vfma(vmul(x, x), like(x, kTanhScale * kTanhCube), like(x, kTanhScale)));
    return vmul(x, sigmoid(inner, rest));  // (1 + tanh(u)) / 2 = sigmoid(2u)
  }
  if constexpr (kind == Activation::swiglu) return vmul(x, sigmoid(x, rest));
  if constexpr (kind == Activation::reglu) return vmax(like(x, 0), x);  // NaN passes through
}

// y = act(x); returns act'(x) * grad.
template <Activation kind, class V>
INLINE V activate_backward(V x, V grad, V& y) {
  if constexpr (kind == Activation::reglu) {
    y = activate<kind>(x);
    return select(less_equal(x, like(x, 0)), like(x, 0), grad);
  } else {
    V slope, rest;
    if constexpr (kind == Activation::geglu) {
      V density;
      const V below = normal_distribution(x, &density);
      y = vmul(x, below), slope = vfma(x, density, below);
    } else if constexpr (kind == Activation::geglu_tanh) {
      const V square = vmul(x, x), one = like(x, kTanhScale), three = like(x, 3 * kTanhScale * kTanhCube);
      const V share = sigmoid(vmul(x, vfma(square, like(x, kTanhScale * kTanhCube), one)), rest);
      y = vmul(x, share), slope = vfma(vmul(y, rest), vfma(square, three, one), share);
    } else {
      const V share = sigmoid(x, rest);
      y = vmul(x, share), slope = vfma(y, rest, share);
    }
    return vmul(slope, grad);
  }
}

// Runs function(std::integral_constant<Activation, kind>).
template <class Function>
INLINE void with_activation(Activation kind, const Function& function) {
  switch (kind) {
    case Activation::geglu:
      return function(std::integral_constant<Activation, Activation::geglu>{});
    case Activation::geglu_tanh:
      return function(std::integral_constant<Activation, Activation::geglu_tanh>{});
    case Activation::swiglu:
      return function(std::integral_constant<Activation, Activation::swiglu>{});
    case Activation::reglu:
      return function(std::integral_constant<Activation, Activation::reglu>{});
  }
}

}  // namespace
}  // namespace pyext
