/* Features of linear attention on a CPU, one row at a time in float32: what cpu_kernels.c and cpu_fused.c share. */

#ifndef ADALA_CPU_FEATURES_H
#define ADALA_CPU_FEATURES_H

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

#define MAX_FEATURES 1024

enum { ELU = 0, RELU = 1, EXP = 2, SOFTMAX_PAIR = 3, IDENTITY = 4 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Rows of (batch, heads, tokens, dim); strides in numbers, that of dim is 1. */
typedef struct {
    void *data;
    int64_t batch_stride, head_stride, token_stride;
} rows_t;

/* What cpu_backend.py fills in; contiguous float32 unless said otherwise. */
typedef struct {
    int64_t batch, heads, tokens, dim;
    int64_t nonlinearity, dtype;
    int64_t tasks, tokens_per_task; /* per image */
    float scale;
    rows_t input;           /* queries or keys, of dtype */
    rows_t gradient;        /* of the input, of dtype */
    void *features;         /* (batch * heads, tokens, features), of dtype */
    const void *products;   /* gradient of the features before the normalizer, the same shape and dtype */
    const float *key_max;   /* (batch * heads, dim), exp alone */
    const uint8_t *mask;    /* (batch, tokens), 1 for real keys; or null */
    const float *normalizer;          /* (batch * heads, features) */
    const float *normalizer_gradient; /* (batch * heads, features) */
    const float *eps;       /* (batch * heads) */
    float *inverse;         /* (batch * heads, tokens), 1 / (phi_q z + eps) */
    float *sums;            /* (batch, tasks, heads, features), what each task adds up over its tokens; or null */
    float *total;           /* (batch * heads, features), to which all of them are added; or null */
} job_t;

static ALWAYS_INLINE int64_t num_features(const job_t *job, int64_t dim) {
    return job->nonlinearity == SOFTMAX_PAIR ? 2 * dim : dim;
}

/* exp(x) of x <= 0, 1e-7 of it off near 0 and 5e-6 at -87, below which it stays at 1.6e-38; NaN stays NaN. */
static ALWAYS_INLINE float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    float t = x * 1.44269504088896341f;
    float n = __builtin_rintf(t);
    float f = t - n;
    float p = 1.326473133331762e-3f; /* 2^f on [-0.5, 0.5], least largest relative error for this degree */
    p = p * f + 9.671513409929557e-3f;
    p = p * f + 5.550733727887818e-2f;
    p = p * f + 2.402224206859938e-1f;
    p = p * f + 6.931469776128922e-1f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static ALWAYS_INLINE void load_row(const void *data, int64_t offset, int64_t dtype, float scale, float *row, int64_t dim) {
    if (dtype == FLOAT32) {
        const float *x = (const float *)data + offset;
        for (int64_t i = 0; i < dim; i++) row[i] = x[i] * scale;
    } else {
        const uint16_t *x = (const uint16_t *)data + offset;
        for (int64_t i = 0; i < dim; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            float value;
            memcpy(&value, &bits, 4);
            row[i] = value * scale;
        }
    }
}

/* Rounds to nearest; a tie, which takes 16 zeros to meet, goes up. */
static ALWAYS_INLINE void store_row(const float *row, void *data, int64_t offset, int64_t dtype, int64_t dim) {
    if (dtype == FLOAT32) {
        memcpy((float *)data + offset, row, sizeof(float) * dim);
    } else {
        uint16_t *x = (uint16_t *)data + offset;
        for (int64_t i = 0; i < dim; i++) {
            uint32_t bits;
            memcpy(&bits, row + i, 4);
            x[i] = (uint16_t)((bits + 0x8000) >> 16);
        }
    }
}

static ALWAYS_INLINE float dot(const float *restrict a, const float *restrict b, int64_t dim) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

/* sign * row through a softmax; the largest number is subtracted first. */
static ALWAYS_INLINE void softmax(const float *restrict row, float sign, float *restrict out, int64_t dim) {
    float largest = sign * row[0], sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < dim; i++) largest = sign * row[i] > largest ? sign * row[i] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += out[i] = fast_exp(sign * row[i] - largest);
    float inverse = 1.0f / sum;
    for (int64_t i = 0; i < dim; i++) out[i] *= inverse;
}

/* x: the scaled row, overwritten. sign: what exp does with the largest keys of head `index`, 1 for queries. */
static ALWAYS_INLINE void nonlinearity(const job_t *job, int64_t dim, float *restrict x, int64_t index, float sign, float *restrict phi) {
    switch (job->nonlinearity) {
    case ELU: /* compared so that NaN stays NaN */
        for (int64_t i = 0; i < dim; i++) phi[i] = fast_exp(x[i] > 0 ? 0 : x[i]) + (x[i] > 0 ? x[i] : 0);
        break;
    case RELU:
        for (int64_t i = 0; i < dim; i++) phi[i] = x[i] < 0 ? 0 : x[i];
        break;
    case EXP: {
        const float *shift = job->key_max + index * dim;
        float largest = 0;
        for (int64_t i = 0; i < dim; i++) x[i] += sign * shift[i];
        if (sign > 0) { /* a query: its own maximum */
            largest = x[0];
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < dim; i++) largest = x[i] > largest ? x[i] : largest;
        }
        for (int64_t i = 0; i < dim; i++) phi[i] = fast_exp(x[i] - largest);
        break;
    }
    case SOFTMAX_PAIR:
        softmax(x, 1.0f, phi, dim);
        softmax(x, -1.0f, phi + dim, dim);
        break;
    default:
        memcpy(phi, x, sizeof(float) * dim);
    }
}

/* Gradient of the features to that of the input; phi may be known up to a positive factor that `gradient` carries. */
static ALWAYS_INLINE void nonlinearity_gradient(const job_t *job, int64_t dim, const float *restrict phi, const float *restrict gradient,
                                         float *restrict out) {
    float scale = job->scale;
    switch (job->nonlinearity) {
    case ELU:
        for (int64_t i = 0; i < dim; i++) out[i] = gradient[i] * (phi[i] < 1 ? phi[i] : 1) * scale;
        break;
    case RELU:
        for (int64_t i = 0; i < dim; i++) out[i] = phi[i] > 0 ? gradient[i] * scale : 0;
        break;
    case EXP:
        for (int64_t i = 0; i < dim; i++) out[i] = gradient[i] * phi[i] * scale;
        break;
    case SOFTMAX_PAIR: {
        float first = dot(phi, gradient, dim), second = dot(phi + dim, gradient + dim, dim);
        for (int64_t i = 0; i < dim; i++)
            out[i] = (phi[i] * (gradient[i] - first) - phi[dim + i] * (gradient[dim + i] - second)) * scale;
        break;
    }
    default:
        for (int64_t i = 0; i < dim; i++) out[i] = gradient[i] * scale;
    }
}

static ALWAYS_INLINE int64_t offset(const rows_t *rows, int64_t image, int64_t head, int64_t token) {
    return image * rows->batch_stride + head * rows->head_stride + token * rows->token_stride;
}

static ALWAYS_INLINE int is_padding(const job_t *job, int64_t image, int64_t token) {
    return job->mask && !job->mask[image * job->tokens + token];
}

#endif
