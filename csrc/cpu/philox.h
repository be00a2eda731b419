// Dropout masks from a counter-based generator: the mask of an element can be recomputed from its
// indices, so masks are not stored, and all backends with this definition use the same mask.
//
// Philox 4x32 with 7 rounds (Salmon et al., SC 2011; seven rounds pass BigCrush). Key: the seed's
// two halves. Counter: (column block, row, head, problem). One counter yields four words, eight
// 16-bit draws. Column c of a row belongs to group g = c / 128, word w = c / 32 % 4, half c % 2 of
// the counter whose column block is 16 g + c / 2 % 16. A draw below `threshold` keeps: keep rate =
// threshold / 65536.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flmoe::FLMOE_ISA {

constexpr int kDropoutGroup = 128;
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// What to drop: nothing when threshold == 65536.
struct Dropout {
  uint32_t key0, key1, threshold;

  bool active() const { return threshold < 65536u; }
};

#if defined(__AVX512BW__)

inline __m512i philox_mul(__m512i a, uint32_t m, __m512i* low) {
  const __m512i mm = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(a, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), mm);
  *low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}

inline void dropout_bits(const Dropout& d, uint32_t problem, uint32_t head, uint32_t row,
                         uint32_t group, uint32_t bits[4]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(group * 16)), lane);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(row));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(head));
  __m512i c3 = _mm512_set1_epi32(static_cast<int>(problem));
  uint32_t k0 = d.key0, k1 = d.key1;
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    __m512i low0, low1;
    const __m512i high0 = philox_mul(c0, kPhiloxM0, &low0);
    const __m512i high1 = philox_mul(c2, kPhiloxM1, &low1);
    // 0x96 is the three-way exclusive or.
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), 0x96);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
    c1 = low1;
    c3 = low0;
  }
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(d.threshold));
  bits[0] = _mm512_cmplt_epu16_mask(c0, threshold);
  bits[1] = _mm512_cmplt_epu16_mask(c1, threshold);
  bits[2] = _mm512_cmplt_epu16_mask(c2, threshold);
  bits[3] = _mm512_cmplt_epu16_mask(c3, threshold);
}

#elif defined(__AVX2__)

inline __m256i philox_mul(__m256i a, uint32_t m, __m256i* low) {
  const __m256i mm = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(a, mm);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), mm);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

// 32 draws in two registers to 32 bits.
inline uint32_t keep_bits(__m256i first, __m256i second, uint32_t threshold) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i drop_a = _mm256_cmpeq_epi16(_mm256_max_epu16(first, t), first);
  const __m256i drop_b = _mm256_cmpeq_epi16(_mm256_max_epu16(second, t), second);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(drop_a, drop_b), 0xD8);
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(packed));
}

inline void dropout_bits(const Dropout& d, uint32_t problem, uint32_t head, uint32_t row,
                         uint32_t group, uint32_t bits[4]) {
  __m256i words[2][4];
  for (int half = 0; half < 2; ++half) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(group * 16 + 8 * half)), lane);
    __m256i c1 = _mm256_set1_epi32(static_cast<int>(row));
    __m256i c2 = _mm256_set1_epi32(static_cast<int>(head));
    __m256i c3 = _mm256_set1_epi32(static_cast<int>(problem));
    uint32_t k0 = d.key0, k1 = d.key1;
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      __m256i low0, low1;
      const __m256i high0 = philox_mul(c0, kPhiloxM0, &low0);
      const __m256i high1 = philox_mul(c2, kPhiloxM1, &low1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(static_cast<int>(k0)));
      c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(static_cast<int>(k1)));
      c1 = low1;
      c3 = low0;
    }
    words[half][0] = c0, words[half][1] = c1, words[half][2] = c2, words[half][3] = c3;
  }
  for (int w = 0; w < 4; ++w) bits[w] = keep_bits(words[0][w], words[1][w], d.threshold);
}

#elif defined(__aarch64__)

inline uint32x4_t philox_mul(uint32x4_t a, uint32_t m, uint32x4_t* low) {
  const uint64x2_t first = vmull_n_u32(vget_low_u32(a), m), second = vmull_high_n_u32(a, m);
  *low = vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
  return vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
}

inline void dropout_bits(const Dropout& d, uint32_t problem, uint32_t head, uint32_t row,
                         uint32_t group, uint32_t bits[4]) {
  constexpr uint32_t kLane[4] = {0, 1, 2, 3};
  const uint16x8_t threshold = vdupq_n_u16(static_cast<uint16_t>(d.threshold));
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  uint8x16_t keep[4][2];  // word, half of its 32 draws
  for (uint32_t half = 0; half < 2; ++half) {
    uint16x8_t below[2][4];
    for (uint32_t quarter = 0; quarter < 2; ++quarter) {
      uint32x4_t c0 = vaddq_u32(vdupq_n_u32(group * 16 + 8 * half + 4 * quarter), vld1q_u32(kLane));
      uint32x4_t c1 = vdupq_n_u32(row), c2 = vdupq_n_u32(head), c3 = vdupq_n_u32(problem);
      uint32_t k0 = d.key0, k1 = d.key1;
      for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        uint32x4_t low0, low1;
        const uint32x4_t high0 = philox_mul(c0, kPhiloxM0, &low0);
        const uint32x4_t high1 = philox_mul(c2, kPhiloxM1, &low1);
        c0 = veorq_u32(veorq_u32(high1, c1), vdupq_n_u32(k0));
        c2 = veorq_u32(veorq_u32(high0, c3), vdupq_n_u32(k1));
        c1 = low1;
        c3 = low0;
      }
      const uint32x4_t words[4] = {c0, c1, c2, c3};
      for (int w = 0; w < 4; ++w)
        below[quarter][w] = vcltq_u16(vreinterpretq_u16_u32(words[w]), threshold);
    }
    for (int w = 0; w < 4; ++w)
      keep[w][half] = vandq_u8(
          bit, vuzp1q_u8(vreinterpretq_u8_u16(below[0][w]), vreinterpretq_u8_u16(below[1][w])));
  }
  // Three sums of neighbours turn eight draws into one byte of bits.
  const uint8x16_t first =
      vpaddq_u8(vpaddq_u8(keep[0][0], keep[0][1]), vpaddq_u8(keep[1][0], keep[1][1]));
  const uint8x16_t second =
      vpaddq_u8(vpaddq_u8(keep[2][0], keep[2][1]), vpaddq_u8(keep[3][0], keep[3][1]));
  vst1q_u32(bits, vreinterpretq_u32_u8(vpaddq_u8(first, second)));
}

#else

inline void dropout_bits(const Dropout& d, uint32_t problem, uint32_t head, uint32_t row,
                         uint32_t group, uint32_t bits[4]) {
  for (int w = 0; w < 4; ++w) bits[w] = 0;
  for (uint32_t lane = 0; lane < 16; ++lane) {
    uint32_t c[4] = {group * 16 + lane, row, head, problem};
    uint32_t k0 = d.key0, k1 = d.key1;
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0];
      const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
      c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
      c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
      c[1] = static_cast<uint32_t>(p1);
      c[3] = static_cast<uint32_t>(p0);
    }
    for (int w = 0; w < 4; ++w) {
      bits[w] |= static_cast<uint32_t>((c[w] & 0xffffu) < d.threshold) << (2 * lane);
      bits[w] |= static_cast<uint32_t>((c[w] >> 16) < d.threshold) << (2 * lane + 1);
    }
  }
}

#endif

// The bits of kLanes<A> columns from `column` (a multiple of kLanes<A> inside its group).
template <typename A>
inline uint32_t lane_bits(const uint32_t bits[4], int column) {
  return bits[column / 32] >> (column % 32);
}

}  // namespace flmoe::FLMOE_ISA
