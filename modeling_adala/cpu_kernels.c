/* The passes over features between the matrix products of linear attention, on a CPU: see cpu_backend.py.
 *
 * A pass reads rows of queries or keys as they lie in memory, works on one row in float32, and writes it once. Products
 * are left to PyTorch. Plain C, so that it builds wherever there is a compiler; the loops are written to be vectorized,
 * and compiled for several generations of processors, of which the right one is chosen when the library is loaded.
 */

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

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
