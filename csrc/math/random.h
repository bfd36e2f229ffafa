// Counter-based dropout: the mask is a function of (seed, batch * heads + head, query, key), so the
// backward, and another device, draw the same one.
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "config.h"

namespace dat {
inline namespace DAT_SIMD {

struct Random4 {
  uint32_t value[4];
};

DAT_HD Random4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One draw serves keys 4 * key_quad .. 4 * key_quad + 3 of a query.
DAT_HD Random4 dropout_draw(uint64_t seed, int64_t batch_head, int64_t query, int64_t key_quad) {
  return philox(uint32_t(query), uint32_t(key_quad), uint32_t(batch_head), uint32_t(query >> 32),
                seed);
}

// Values below the threshold are dropped; the others are multiplied by the scale.
struct Dropout {
  uint64_t threshold;
  double scale;
};

DAT_HD Dropout dropout_rule(double p) {
  return {uint64_t(p * 4294967296.0), p < 1 ? 1 / (1 - p) : 0.0};
}

}  // namespace DAT_SIMD
}  // namespace dat
