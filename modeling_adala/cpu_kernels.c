/* The passes over features between the matrix products of linear attention, on a CPU: see cpu_backend.py.
 *
 * A pass reads rows of queries or keys as they lie in memory, works on one row in float32, and writes it once. Products
 * are left to PyTorch. Plain C, so that it builds wherever there is a compiler; the loops are written to be vectorized,
 * and compiled for several generations of processors, of which the right one is chosen when the library is loaded.
 */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

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

/* One task: tokens [first, last) of all heads of one image. Head by head, reading would jump from page to page. */
typedef struct {
    int64_t image, first, last;
    float *sums; /* (heads, features) */
} task_t;

static ALWAYS_INLINE task_t get_task(const job_t *job, int64_t number) {
    int64_t first = number % job->tasks * job->tokens_per_task, last = first + job->tokens_per_task;
    task_t task = {number / job->tasks, first < job->tokens ? first : job->tokens, last < job->tokens ? last : job->tokens, 0};
    if (job->sums) {
        int64_t numbers = job->heads * num_features(job, job->dim);
        task.sums = job->sums + number * numbers;
        memset(task.sums, 0, sizeof(float) * numbers);
    }
    return task;
}

static ALWAYS_INLINE int64_t offset(const rows_t *rows, int64_t image, int64_t head, int64_t token) {
    return image * rows->batch_stride + head * rows->head_stride + token * rows->token_stride;
}

static ALWAYS_INLINE int is_padding(const job_t *job, int64_t image, int64_t token) {
    return job->mask && !job->mask[image * job->tokens + token];
}

static ALWAYS_INLINE void key_features_of(const job_t *job, int64_t number, int64_t dim) {
    task_t task = get_task(job, number);
    int64_t features = num_features(job, dim);
    float row[MAX_FEATURES], phi[MAX_FEATURES];
    for (int64_t token = task.first; token < task.last; token++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t index = task.image * job->heads + head, at = index * job->tokens + token;
            if (is_padding(job, task.image, token)) {
                memset(phi, 0, sizeof(float) * features);
            } else {
                load_row(job->input.data, offset(&job->input, task.image, head, token), job->dtype, job->scale, row, dim);
                nonlinearity(job, dim, row, index, -1.0f, phi);
                if (task.sums)
                    for (int64_t i = 0; i < features; i++) task.sums[head * features + i] += phi[i];
            }
            store_row(phi, job->features, at * features, job->dtype, features);
        }
}

/* The input as it is, head by head. */
static ALWAYS_INLINE void gather_of(const job_t *job, int64_t number, int64_t dim) {
    task_t task = get_task(job, number);
    size_t size = job->dtype == FLOAT32 ? 4 : 2;
    for (int64_t token = task.first; token < task.last; token++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t at = (task.image * job->heads + head) * job->tokens + token;
            const char *from = (const char *)job->input.data + offset(&job->input, task.image, head, token) * size;
            memcpy((char *)job->features + at * dim * size, from, dim * size);
        }
}

static ALWAYS_INLINE void query_features_of(const job_t *job, int64_t number, int64_t dim) {
    task_t task = get_task(job, number);
    int64_t features = num_features(job, dim);
    float row[MAX_FEATURES], phi[MAX_FEATURES];
    for (int64_t token = task.first; token < task.last; token++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t index = task.image * job->heads + head, at = index * job->tokens + token;
            load_row(job->input.data, offset(&job->input, task.image, head, token), job->dtype, job->scale, row, dim);
            nonlinearity(job, dim, row, index, 1.0f, phi);
            float inverse = 1.0f / (dot(phi, job->normalizer + index * features, features) + job->eps[index]);
            job->inverse[at] = inverse;
            for (int64_t i = 0; i < features; i++) phi[i] *= inverse;
            store_row(phi, job->features, at * features, job->dtype, features);
        }
}

/* With a = phi_q / d, d = phi_q z + eps, G = grad_out S^T and c = a G: the gradient of phi_q is (G - c z) / d, and that of
 * z is the sum of -c a. */
static ALWAYS_INLINE void query_gradient_of(const job_t *job, int64_t number, int64_t dim) {
    task_t task = get_task(job, number);
    int64_t features = num_features(job, dim);
    float a[MAX_FEATURES], g[MAX_FEATURES], out[MAX_FEATURES];
    for (int64_t token = task.first; token < task.last; token++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t index = task.image * job->heads + head, at = index * job->tokens + token;
            const float *normalizer = job->normalizer + index * features;
            load_row(job->features, at * features, job->dtype, 1.0f, a, features);
            load_row(job->products, at * features, job->dtype, 1.0f, g, features);
            float c = dot(a, g, features), inverse = job->inverse[at], denominator = 1.0f / inverse;
            float *sum = task.sums + head * features;
            for (int64_t i = 0; i < features; i++) {
                sum[i] -= c * a[i];
                g[i] = (g[i] - c * normalizer[i]) * inverse;
                a[i] *= denominator;
            }
            nonlinearity_gradient(job, dim, a, g, out);
            store_row(out, job->gradient.data, offset(&job->gradient, task.image, head, token), job->dtype, dim);
        }
}

static ALWAYS_INLINE void key_gradient_of(const job_t *job, int64_t number, int64_t dim) {
    task_t task = get_task(job, number);
    int64_t features = num_features(job, dim);
    float phi[MAX_FEATURES], g[MAX_FEATURES], out[MAX_FEATURES];
    for (int64_t token = task.first; token < task.last; token++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t index = task.image * job->heads + head, at = index * job->tokens + token;
            if (is_padding(job, task.image, token)) {
                memset(out, 0, sizeof(float) * dim);
            } else {
                const float *of_normalizer = job->normalizer_gradient + index * features;
                load_row(job->features, at * features, job->dtype, 1.0f, phi, features);
                load_row(job->products, at * features, job->dtype, 1.0f, g, features);
                for (int64_t i = 0; i < features; i++) g[i] += of_normalizer[i];
                nonlinearity_gradient(job, dim, phi, g, out);
            }
            store_row(out, job->gradient.data, offset(&job->gradient, task.image, head, token), job->dtype, dim);
        }
}

static void add_up(const job_t *job) {
    int64_t numbers = job->heads * num_features(job, job->dim);
    for (int64_t task = 0; task < job->batch * job->tasks; task++) {
        const float *sums = job->sums + task * numbers;
        float *total = job->total + task / job->tasks * numbers;
        for (int64_t i = 0; i < numbers; i++) total[i] += sums[i];
    }
}

/* The usual head_dim is known to the compiler, which then unrolls: a third faster. PyTorch's own OpenMP runtime serves the
 * loop, see setup.py: its threads, and torch.set_num_threads. */
#define PASS(name)                                                                                                     \
    FOR_EACH_PROCESSOR static void name(const job_t *job, int64_t number) {                                            \
        if (job->dim == 64)                                                                                            \
            name##_of(job, number, 64);                                                                                \
        else                                                                                                           \
            name##_of(job, number, job->dim);                                                                          \
    }                                                                                                                  \
    PUBLIC void adala_##name(const job_t *job) {                                                                       \
        int64_t tasks = job->batch * job->tasks;                                                                       \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < tasks; i++) name(job, i);                 \
        if (job->total) add_up(job);                                                                                   \
    }

PASS(gather)
PASS(key_features)
PASS(query_features)
PASS(query_gradient)
PASS(key_gradient)
