/* The whole forward pass of linear attention in one call, for processors that multiply bfloat16 (AVX512-BF16).
 *
 * Tokens come in chunks that stay in the caches: features are computed, packed as the processor multiplies them (two
 * tokens, or two features, in 32 bits) and used up at once; nothing of them goes to memory. State and normalizer are
 * float32. Few heads at a time, so that their states stay in the caches, too.
 */

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#include <immintrin.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#define BFLOAT16_PROCESSOR __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define CHUNK 64             /* tokens, a multiple of 4 */
#define STATE_BYTES (1 << 18) /* of the heads that go together */

/* What cpu_passes.py fills in. */
typedef struct {
    job_t keys; /* without what is written; tokens are those of the keys */
    int64_t query_tokens, value_dim;
    rows_t query, value, output;
    char *workspace; /* adala_workspace() bytes */
} attention_t;

/* Widths with their padding, sizes in bytes, and where things lie in the workspace of a thread and in that of all. */
typedef struct {
    int64_t features, columns;                     /* multiples of 4 and 16 */
    int64_t group, groups;                         /* heads that go together, and how many times that is */
    int64_t keys, values, state, packed;           /* per head */
    int64_t own, shared;                           /* per thread, and per segment or thread */
    int64_t threads;
} plan_t;

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static plan_t get_plan(const attention_t *job) {
    plan_t plan;
    plan.features = round_up(num_features(&job->keys, job->keys.dim), 4);
    plan.columns = round_up(job->value_dim, 16);
    plan.keys = round_up(CHUNK * plan.features * 2, 64);
    plan.values = round_up(CHUNK * plan.columns * 2, 64);
    plan.state = round_up((plan.features * plan.columns + plan.features) * 4, 64); /* the normalizer comes last */
    plan.packed = round_up(plan.features * plan.columns * 2, 64);
    plan.group = STATE_BYTES / plan.state;
    plan.group = plan.group < 1 ? 1 : plan.group > job->keys.heads ? job->keys.heads : plan.group;
    plan.groups = (job->keys.heads + plan.group - 1) / plan.group;
    plan.own = plan.group * (plan.keys + plan.values);
    plan.shared = plan.group * (plan.state + plan.packed);
#if defined(_OPENMP)
    plan.threads = omp_get_max_threads();
#else
    plan.threads = 1;
#endif
    return plan;
}

PUBLIC int64_t adala_workspace(const attention_t *job) {
    plan_t plan = get_plan(job);
    return plan.threads * (plan.own + plan.shared);
}

PUBLIC int64_t adala_has_fused(void) { return __builtin_cpu_supports("avx512bf16") != 0; }

static ALWAYS_INLINE uint32_t bfloat16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits + 0x8000;
}

/* Two rows of numbers as one row of pairs. */
static ALWAYS_INLINE void pack_pairs(const float *restrict low, const float *restrict high, uint32_t *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = bfloat16_bits(low[i]) >> 16 | (bfloat16_bits(high[i]) & 0xffff0000);
}

/* c[i][j] += sum over `count` of a (rows of pairs, `a_step` apart in i and `a_next` along the sum) times b. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void multiply(const uint32_t *a, int64_t a_step, int64_t a_next, const uint32_t *b,
                                                      int64_t b_next, int64_t count, int vectors, __m512 c[4][4]) {
    for (int64_t k = 0; k < count; k++) {
        __m512bh right[4];
        for (int j = 0; j < vectors; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + k * b_next + 16 * j);
        for (int i = 0; i < 4; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * a_step + k * a_next]);
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], left, right[j]);
        }
    }
}

/* state (features, columns) += keys^T values, of pairs of tokens. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void add_to_state(const uint32_t *keys, const uint32_t *values, float *state,
                                                          int64_t pairs, int64_t features, int64_t columns, int vectors) {
    for (int64_t f = 0; f < features; f += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_loadu_ps(state + (f + i) * columns + 16 * j);
        multiply(keys + f, 1, features, values, columns, pairs, vectors, c);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(state + (f + i) * columns + 16 * j, c[i][j]);
    }
}

/* Writes rows [0, tokens) of queries times the packed state; `width` columns are left. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_output(const uint32_t *queries, const uint32_t *packed, uint16_t *out,
                                                          int64_t out_step, int64_t tokens, int64_t features,
                                                          int64_t columns, int64_t width, int vectors) {
    for (int64_t token = 0; token < tokens; token += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_setzero_ps();
        multiply(queries + token * features / 2, features / 2, 1, packed, columns, features / 2, vectors, c);
        for (int i = 0; i < 4 && token + i < tokens; i++)
            for (int j = 0; j < vectors; j++) {
                int64_t left = width - 16 * j;
                __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
                __m256i rounded = (__m256i)_mm512_cvtneps_pbh(c[i][j]);
                _mm256_mask_storeu_epi16(out + (token + i) * out_step + 16 * j, mask, rounded);
            }
    }
}

/* phi of keys in pairs of tokens, and values in pairs of tokens, of some heads; sums of phi are added up. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_keys(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                                       int64_t heads, int64_t first, int64_t count, char *own, char *states,
                                                       int64_t dim) {
    const job_t *keys = &job->keys;
    int64_t features = num_features(keys, dim);
    float row[MAX_FEATURES], phi[2][MAX_FEATURES] = {{0}};
    for (int64_t pair = 0; pair < (count + 1) / 2; pair++)
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *value[2] = {0, 0};
            float *normalizer = (float *)(states + h * plan->state) + plan->features * plan->columns;
            for (int64_t i = 0; i < 2; i++) {
                int64_t token = first + 2 * pair + i;
                if (token >= first + count || is_padding(keys, image, token)) {
                    memset(phi[i], 0, sizeof(float) * features);
                    continue;
                }
                load_row(keys->input.data, offset(&keys->input, image, head + h, token), BFLOAT16, keys->scale, row, dim);
                nonlinearity(keys, dim, row, image * keys->heads + head + h, -1.0f, phi[i]);
                for (int64_t j = 0; j < features; j++) normalizer[j] += phi[i][j];
                value[i] = (const uint16_t *)job->value.data + offset(&job->value, image, head + h, token);
            }
            uint32_t *out = (uint32_t *)(own + h * plan->keys) + pair * plan->features;
            pack_pairs(phi[0], phi[1], out, plan->features);
            out = (uint32_t *)(own + plan->group * plan->keys + h * plan->values) + pair * plan->columns;
            static const uint16_t none[MAX_FEATURES] = {0};
            const uint16_t *low = value[0] ? value[0] : none, *high = value[1] ? value[1] : none;
            for (int64_t j = 0; j < job->value_dim; j++) out[j] = low[j] | (uint32_t)high[j] << 16;
            for (int64_t j = job->value_dim; j < plan->columns; j++) out[j] = 0;
        }
}

/* Features of queries over their normalizer, as they are: pairs of features lie next to each other. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_queries(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                                          int64_t heads, int64_t first, int64_t count, char *own,
                                                          const char *states, int64_t dim) {
    const job_t *keys = &job->keys;
    int64_t features = num_features(keys, dim);
    float row[MAX_FEATURES], phi[MAX_FEATURES] = {0};
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t index = image * keys->heads + head + h;
            const float *normalizer = (const float *)(states + h * plan->state) + plan->features * plan->columns;
            load_row(job->query.data, offset(&job->query, image, head + h, first + token), BFLOAT16, keys->scale, row, dim);
            nonlinearity(keys, dim, row, index, 1.0f, phi);
            float inverse = 1.0f / (dot(phi, normalizer, features) + keys->eps[index]);
            for (int64_t j = 0; j < features; j++) phi[j] *= inverse;
            store_row(phi, own + h * plan->keys, token * plan->features, BFLOAT16, plan->features);
        }
}

#define BY_VECTORS(call)                                                                                               \
    switch (vectors) {                                                                                                 \
    case 1: { enum { VECTORS = 1 }; call; break; }                                                                     \
    case 2: { enum { VECTORS = 2 }; call; break; }                                                                     \
    case 3: { enum { VECTORS = 3 }; call; break; }                                                                     \
    default: { enum { VECTORS = 4 }; call; }                                                                           \
    }

/* States of some heads over tokens [first, last). */
static BFLOAT16_PROCESSOR void reduce_keys(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                           int64_t heads, int64_t first, int64_t last, char *own, char *states) {
    memset(states, 0, heads * plan->state);
    for (; first < last; first += CHUNK) {
        int64_t count = last - first < CHUNK ? last - first : CHUNK;
        if (job->keys.dim == 64)
            pack_keys(job, plan, image, head, heads, first, count, own, states, 64);
        else
            pack_keys(job, plan, image, head, heads, first, count, own, states, job->keys.dim);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t column = 0; column < plan->columns; column += 64) {
                const uint32_t *keys = (const uint32_t *)(own + h * plan->keys);
                const uint32_t *values = (const uint32_t *)(own + plan->group * plan->keys + h * plan->values) + column;
                float *state = (float *)(states + h * plan->state) + column;
                int64_t vectors = (plan->columns - column) / 16;
                BY_VECTORS(add_to_state(keys, values, state, (count + 1) / 2, plan->features, plan->columns, VECTORS))
            }
    }
}

/* Adds up the states of all segments in the first, and packs it. */
static BFLOAT16_PROCESSOR void pack_state(const plan_t *plan, int64_t h, int64_t segments, char *states, char *packed) {
    float *total = (float *)(states + h * plan->state);
    for (int64_t segment = 1; segment < segments; segment++) {
        const float *part = (const float *)(states + segment * plan->group * plan->state + h * plan->state);
        for (int64_t i = 0; i < plan->features * (plan->columns + 1); i++) total[i] += part[i];
    }
    for (int64_t pair = 0; pair < plan->features / 2; pair++) {
        const float *row = total + 2 * pair * plan->columns;
        pack_pairs(row, row + plan->columns, (uint32_t *)(packed + h * plan->packed) + pair * plan->columns, plan->columns);
    }
}

/* The output of some heads for tokens [first, last). */
static BFLOAT16_PROCESSOR void read_out(const attention_t *job, const plan_t *plan, int64_t image, int64_t head, int64_t heads,
                                        int64_t first, int64_t last, char *own, const char *states, const char *packed) {
    for (; first < last; first += CHUNK) {
        int64_t count = last - first < CHUNK ? last - first : CHUNK;
        if (job->keys.dim == 64)
            pack_queries(job, plan, image, head, heads, first, count, own, states, 64);
        else
            pack_queries(job, plan, image, head, heads, first, count, own, states, job->keys.dim);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t column = 0; column < plan->columns; column += 64) {
                const uint32_t *queries = (const uint32_t *)(own + h * plan->keys);
                const uint32_t *state = (const uint32_t *)(packed + h * plan->packed) + column;
                uint16_t *out = (uint16_t *)job->output.data + offset(&job->output, image, head + h, first) + column;
                int64_t vectors = (plan->columns - column) / 16;
                BY_VECTORS(write_output(queries, state, out, job->output.token_stride, count, plan->features,
                                        plan->columns, job->value_dim - column, VECTORS))
            }
    }
}

static int64_t heads_of(const attention_t *job, const plan_t *plan, int64_t head) {
    return job->keys.heads - head < plan->group ? job->keys.heads - head : plan->group;
}

/* Tokens [first, last) of a segment, whole chunks. */
static int64_t bound(int64_t tokens, int64_t segment, int64_t segments) {
    int64_t step = round_up((tokens + segments - 1) / segments, 4);
    return segment * step < tokens ? segment * step : tokens;
}

PUBLIC void adala_attention(const attention_t *job) {
    plan_t plan = get_plan(job);
    int64_t units = job->keys.batch * plan.groups, segments = plan.threads;
    char *shared = job->workspace + plan.threads * plan.own, *packed = shared + segments * plan.group * plan.state;
    if (units >= plan.threads) { /* every thread has images or heads of its own */
        _Pragma("omp parallel for schedule(static)") for (int64_t unit = 0; unit < units; unit++) {
            int64_t thread = 0;
#if defined(_OPENMP)
            thread = omp_get_thread_num();
#endif
            char *own = job->workspace + thread * plan.own, *states = shared + thread * plan.group * plan.state;
            char *mine = packed + thread * plan.group * plan.packed;
            int64_t image = unit / plan.groups, head = unit % plan.groups * plan.group, heads = heads_of(job, &plan, head);
            reduce_keys(job, &plan, image, head, heads, 0, job->keys.tokens, own, states);
            for (int64_t h = 0; h < heads; h++) pack_state(&plan, h, 1, states, mine);
            read_out(job, &plan, image, head, heads, 0, job->query_tokens, own, states, mine);
        }
        return;
    }
    for (int64_t unit = 0; unit < units; unit++) { /* threads share the tokens of each */
        int64_t image = unit / plan.groups, head = unit % plan.groups * plan.group, heads = heads_of(job, &plan, head);
        _Pragma("omp parallel") {
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < segments; i++)
                reduce_keys(job, &plan, image, head, heads, bound(job->keys.tokens, i, segments),
                            bound(job->keys.tokens, i + 1, segments), job->workspace + i * plan.own,
                            shared + i * plan.group * plan.state);
            _Pragma("omp for schedule(static)") for (int64_t h = 0; h < heads; h++)
                pack_state(&plan, h, segments, shared, packed);
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < segments; i++)
                read_out(job, &plan, image, head, heads, bound(job->query_tokens, i, segments),
                         bound(job->query_tokens, i + 1, segments), job->workspace + i * plan.own, shared, packed);
        }
    }
}

#else

PUBLIC int64_t adala_has_fused(void) { return 0; }

#endif
