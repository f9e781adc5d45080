// The pointwise half of the Jacobian sweeps (kernels.h gives the formulas).
//
// What depends on the activation alone, phi' and phi'', is worked out once a sample and block of columns and used for
// all its latents: the inner loops read 1 to 2 numbers, write 1 and do 1 to 4 FLOPs an element, whatever the
// activation.
#include "../math/jacobian.h"

#include <algorithm>

#include "../kernels.h"
#include "clones.h"
#include "lane_sum.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kBlock = 256;  // columns: the local arrays stay in the L1 cache

template <typename T>
struct Bends {
  T slope[kBlock];
  T factor[kBlock];
};

template <Activation kind, typename T>
FASTVAE_INLINE void fill_bends(const ActivationSpec& activation, const T* s, int64_t count, Bends<T>& bends) {
  const math::Phi<kind, T> phi(activation);
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    const math::Bend<T> bend = math::bend(phi, s[j]);
    bends.slope[j] = bend.slope;
    bends.factor[j] = bend.factor;
  }
}

// Calls body(first, count, bends) for the blocks of columns [begin, end) of one sample.
template <typename T, typename Body>
FASTVAE_INLINE void for_each_block(const ActivationSpec& activation, const T* s, int64_t begin, int64_t end,
                                   const Body& body) {
  Bends<T> bends;
  if (s == nullptr) {
    std::fill_n(bends.slope, kBlock, T(1));
    std::fill_n(bends.factor, kBlock, T(0));
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    if (s != nullptr) {
      switch (activation.kind) {
#define FASTVAE_FILL_BENDS(KIND, ...)                                  \
  case Activation::KIND:                                               \
    fill_bends<Activation::KIND>(activation, s + first, count, bends); \
    break;
        FASTVAE_ACTIVATION_KINDS(FASTVAE_FILL_BENDS)
#undef FASTVAE_FILL_BENDS
      }
    }
    body(first, count, bends);
  }
}

template <typename T>
FASTVAE_INLINE void jacobian_tangent_template(const JacobianTangent<T>& args, int64_t begin, int64_t end) {
  const int64_t n = args.numel;
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* adot = args.adot + (args.shared ? 0 : sample * args.latents * n);
    T* hdot = args.hdot + sample * args.latents * n;
    for_each_block(args.activation, args.s == nullptr ? args.s : args.s + sample * n, int64_t(0), n,
                   [&](int64_t first, int64_t count, const Bends<T>& bends) FASTVAE_LAMBDA_INLINE {
                     for (int64_t i = 0; i < args.latents; ++i) {
                       const T* from = adot + i * n + first;
                       T* to = hdot + i * n + first;
#pragma GCC ivdep
                       for (int64_t j = 0; j < count; ++j) {
                         to[j] = bends.slope[j] * from[j];
                       }
                     }
                   });
  }
}

// The terms of one block of columns of one latent.
template <bool squared, typename T>
FASTVAE_INLINE void sum_terms(const T* adot, const T* slope, int64_t count, LaneSum<T>& sum) {
  constexpr int kLanes = LaneSum<T>::kLanes;
  LaneSum<T> part = sum;  // a local, which no store to memory can alias
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      part.lanes[lane] += math::jacobian_term(slope[j + lane] * adot[j + lane], squared).value;
    }
  }
  for (; j < count; ++j) {
    part.lanes[0] += math::jacobian_term(slope[j] * adot[j], squared).value;
  }
  sum = part;
}

// The start of the adjoint sweep there; abar may be null.
template <typename T>
FASTVAE_INLINE void start_adjoint(const T* adot, const Bends<T>& bends, bool squared, bool from_input, T weight,
                                  int64_t count, T* abar, T* adotbar) {
  if (abar != nullptr) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const T ydot = bends.slope[j] * adot[j];
      abar[j] += bends.factor[j] * (from_input ? adot[j] : ydot) * weight * math::jacobian_term(ydot, squared).slope;
    }
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    adotbar[j] = bends.slope[j] * weight * math::jacobian_term(bends.slope[j] * adot[j], squared).slope;
  }
}

template <typename T>
FASTVAE_INLINE void jacobian_head_template(const JacobianHead<T>& args, int64_t begin, int64_t end) {
  const int64_t n = args.numel;
  const int64_t chunks = jacobian_chunks(n);
  const bool from_input = keeps_input(args.activation.kind);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / chunks;
    const int64_t from = index % chunks * kJacobianChunk;
    const int64_t rows = sample * args.latents * n;
    const int64_t columns = sample * args.outputs + args.first;
    const T weight = args.weight == nullptr ? T(1) : args.weight[sample];
    LaneSum<T> sum;
    for_each_block(
        args.activation, args.s == nullptr ? args.s : args.s + columns, from, std::min(n, from + kJacobianChunk),
        [&](int64_t first, int64_t count, const Bends<T>& bends) FASTVAE_LAMBDA_INLINE {
          T* abar = args.abar == nullptr ? nullptr : args.abar + columns + first;
          if (abar != nullptr) {
            std::fill_n(abar, count, T(0));
          }
          for (int64_t i = 0; i < args.latents; ++i) {
            const int64_t at = rows + i * n + first;
            args.squared ? sum_terms<true>(args.adot + at, bends.slope, count, sum)
                         : sum_terms<false>(args.adot + at, bends.slope, count, sum);
            if (args.adotbar != nullptr) {
              start_adjoint(args.adot + at, bends, args.squared, from_input, weight, count, abar, args.adotbar + at);
            }
          }
        });
    args.terms[index] = sum.total();
  }
}

template <typename T>
FASTVAE_INLINE void jacobian_adjoint_template(const JacobianAdjoint<T>& args, int64_t begin, int64_t end) {
  const int64_t n = args.numel;
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t rows = sample * args.latents * n;
    for_each_block(args.activation, args.s == nullptr ? args.s : args.s + sample * n, int64_t(0), n,
                   [&](int64_t first, int64_t count, const Bends<T>& bends) FASTVAE_LAMBDA_INLINE {
                     T* abar = args.abar == nullptr ? nullptr : args.abar + sample * n + first;
                     if (abar != nullptr) {
                       const T* hbar = args.hbar == nullptr ? nullptr : args.hbar + sample * n + first;
#pragma GCC ivdep
                       for (int64_t j = 0; j < count; ++j) {
                         abar[j] = hbar == nullptr ? T(0) : bends.slope[j] * hbar[j];
                       }
                     }
                     for (int64_t i = 0; i < args.latents; ++i) {
                       const T* hdotbar = args.hdotbar + rows + i * n + first;
                       T* adotbar = args.adotbar + rows + i * n + first;
                       if (args.e != nullptr) {
                         const T* e = args.e + (args.shared ? 0 : rows) + i * n + first;
#pragma GCC ivdep
                         for (int64_t j = 0; j < count; ++j) {
                           abar[j] += bends.factor[j] * e[j] * hdotbar[j];
                         }
                       }
#pragma GCC ivdep
                       for (int64_t j = 0; j < count; ++j) {
                         adotbar[j] = bends.slope[j] * hdotbar[j];
                       }
                     }
                   });
  }
}

}  // namespace

FASTVAE_DEFINE_CPU(jacobian_tangent, JacobianTangent)
FASTVAE_DEFINE_CPU(jacobian_head, JacobianHead)
FASTVAE_DEFINE_CPU(jacobian_adjoint, JacobianAdjoint)

}  // namespace fastvae::cpu
