/* Rows of features, and products of them, in registers of processors that multiply bfloat16 (AVX512-BF16).
 *
 * Packed means words of 32 bits: one float32, or a pair of bfloat16, of two tokens where a sum runs over tokens and of two
 * neighbors in a row where it runs along rows.
 */

#ifndef ADALA_CPU_VECTORS_H
#define ADALA_CPU_VECTORS_H

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#define HAS_FUSED
#include <immintrin.h>

#define BFLOAT16_PROCESSOR __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define MAX_VECTORS 16 /* of 16 numbers in a row of queries or keys */

/* exp(x) of x <= 0, as `fast_exp` in cpu_features.h. The order of operands of min and max keeps NaN. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR __m512 exp_vector(__m512 x) {
    __m512 t = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87.0f), x), _mm512_set1_ps(1.44269504088896341f));
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.326473133331762e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671513409929557e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733727887818e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402224206859938e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931469776128922e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), n);
}

/* Those of the next 16 numbers of a row that it has, when so many are left. */
static ALWAYS_INLINE __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1); }

/* The largest number of a row of `dim`. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR __m512 row_max(const __m512 *x, int64_t dim) {
    __m512 largest = x[0], none = _mm512_set1_ps(-3e38f);
    for (int64_t i = 0; 16 * i < dim; i++) largest = _mm512_max_ps(largest, _mm512_mask_mov_ps(none, lanes(dim - 16 * i), x[i]));
    return _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_mask_mov_ps(none, lanes(dim), largest)));
}

/* sign * x through a softmax. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void softmax_vectors(const __m512 *x, float sign, __m512 *out, int64_t dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; 16 * i < dim; i++) out[i] = _mm512_mul_ps(x[i], _mm512_set1_ps(sign));
    __m512 largest = row_max(out, dim);
    for (int64_t i = 0; 16 * i < dim; i++) {
        out[i] = exp_vector(_mm512_sub_ps(out[i], largest));
        sum = _mm512_mask_add_ps(sum, lanes(dim - 16 * i), sum, out[i]);
    }
    __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; 16 * i < dim; i++) out[i] = _mm512_mul_ps(out[i], inverse);
}

/* phi of a row, in vectors of 16 with zeros behind; see `nonlinearity` in cpu_features.h. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void features_of(const job_t *job, const rows_t *rows, int64_t image, int64_t head,
                                                         int64_t token, float sign, __m512 *phi, int64_t dim) {
    int64_t at = offset(rows, image, head, token), vectors = (dim + 15) / 16;
    const __m512 zero = _mm512_setzero_ps(), scale = _mm512_set1_ps(job->scale);
    __m512 x[MAX_VECTORS];
    for (int64_t i = 0; i < vectors; i++) {
        __mmask16 mask = lanes(dim - 16 * i);
        if (job->dtype == FLOAT32) {
            x[i] = _mm512_maskz_loadu_ps(mask, (const float *)rows->data + at + 16 * i);
        } else {
            __m256i row = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)rows->data + at + 16 * i);
            x[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(row), 16));
        }
        x[i] = _mm512_mul_ps(x[i], scale);
    }
    switch (job->nonlinearity) {
    case ELU:
        for (int64_t i = 0; i < vectors; i++)
            phi[i] = _mm512_add_ps(exp_vector(_mm512_min_ps(zero, x[i])), _mm512_max_ps(zero, x[i]));
        break;
    case RELU:
        for (int64_t i = 0; i < vectors; i++) phi[i] = _mm512_max_ps(zero, x[i]);
        break;
    case EXP: {
        const float *key_max = job->key_max + (image * job->heads + head) * dim;
        for (int64_t i = 0; i < vectors; i++) {
            __m512 shift = _mm512_maskz_loadu_ps(lanes(dim - 16 * i), key_max + 16 * i);
            x[i] = _mm512_fmadd_ps(_mm512_set1_ps(sign), shift, x[i]);
        }
        __m512 largest = sign > 0 ? row_max(x, dim) : zero;
        for (int64_t i = 0; i < vectors; i++) phi[i] = exp_vector(_mm512_sub_ps(x[i], largest));
        break;
    }
    case SOFTMAX_PAIR:
        softmax_vectors(x, 1.0f, phi, dim);
        softmax_vectors(x, -1.0f, phi + vectors, dim);
        phi[2 * vectors - 1] = _mm512_maskz_mov_ps(lanes(dim - 16 * (vectors - 1)), phi[2 * vectors - 1]);
        break;
    default:
        for (int64_t i = 0; i < vectors; i++) phi[i] = x[i];
    }
    phi[vectors - 1] = _mm512_maskz_mov_ps(lanes(dim - 16 * (vectors - 1)), phi[vectors - 1]);
}

/* Two rows of numbers, rounded, as one row of pairs. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_pairs(const __m512 *low, const __m512 *high, uint32_t *out, int64_t vectors) {
    for (int64_t i = 0; i < vectors; i++) {
        __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low[i]));
        __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high[i]));
        _mm512_storeu_si512(out + 16 * i, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

/* c[i][j] += sum over `count` of a (words, `a_step` apart in i and `a_next` along the sum) times b. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void multiply(const uint32_t *a, int64_t a_step, int64_t a_next, const uint32_t *b,
                                                      int64_t b_next, int64_t count, int vectors, int pair, __m512 c[4][4]) {
    for (int64_t k = 0; k < count; k++) {
        __m512i right[4];
        for (int j = 0; j < vectors; j++) right[j] = _mm512_loadu_si512(b + k * b_next + 16 * j);
        for (int i = 0; i < 4; i++) {
            __m512i left = _mm512_set1_epi32((int)a[i * a_step + k * a_next]);
            for (int j = 0; j < vectors; j++)
                c[i][j] = pair == 1
                              ? _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right[j]), c[i][j])
                              : _mm512_dpbf16_ps(c[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
}

/* state (features, columns) += keys^T values, of `count` words per feature; added up on their own first, so that the sum
 * over many tokens is rounded once in a chunk and not at every token. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void add_to_state_of(int vectors, int pair, const uint32_t *keys,
                                                             const uint32_t *values, float *state, int64_t count,
                                                             int64_t features, int64_t columns) {
    for (int64_t f = 0; f < features; f += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_setzero_ps();
        multiply(keys + f, 1, features, values, columns, count, vectors, pair, c);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) {
                float *sum = state + (f + i) * columns + 16 * j;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), c[i][j]));
            }
    }
}

/* Writes rows [0, tokens) of features times the state, `words` per row; `width` columns are left. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_rows_of(int vectors, int pair, const uint32_t *features,
                                                           const uint32_t *state, const rows_t *out, int64_t at,
                                                           int64_t tokens, int64_t words, int64_t columns, int64_t width) {
    for (int64_t token = 0; token < tokens; token += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_setzero_ps();
        multiply(features + token * words, words, 1, state, columns, words, vectors, pair, c);
        for (int i = 0; i < 4 && token + i < tokens; i++)
            for (int j = 0; j < vectors; j++) {
                int64_t left = width - 16 * j, here = at + (token + i) * out->token_stride + 16 * j;
                __mmask16 mask = lanes(left);
                if (pair == 1)
                    _mm512_mask_storeu_ps((float *)out->data + here, mask, c[i][j]);
                else
                    _mm256_mask_storeu_epi16((uint16_t *)out->data + here, mask, (__m256i)_mm512_cvtneps_pbh(c[i][j]));
            }
    }
}

/* products (tokens in whole fours, features) of rows of `words` and a transposed state. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_products_of(int vectors, int pair, const uint32_t *rows,
                                                               const uint32_t *transposed, float *products,
                                                               int64_t tokens, int64_t words, int64_t features) {
    for (int64_t token = 0; token < tokens; token += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_setzero_ps();
        multiply(rows + token * words, words, 1, transposed, features, words, vectors, pair, c);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(products + (token + i) * features + 16 * j, c[i][j]);
    }
}

#endif
#endif
