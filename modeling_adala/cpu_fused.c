/* The whole forward pass of linear attention in one call, for processors that multiply bfloat16 (AVX512-BF16).
 *
 * Tokens come in chunks that stay in the caches: features are computed, packed as the processor multiplies them and used
 * up at once; nothing of them goes to memory. State and normalizer are float32. Few heads at a time, so that their states
 * stay in the caches, too. Packed means words of 32 bits: one float32, or a pair of bfloat16 of two tokens (of keys and
 * values) or of two features (of queries and the state).
 */

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#include <immintrin.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define BFLOAT16_PROCESSOR __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define CHUNK 64             /* tokens, a multiple of 4 */
#define STATE_BYTES (1 << 18) /* of the heads that go together */
#define MAX_VECTORS 16       /* of 16 numbers in a row of queries or keys */
#define HUGE_PAGE (1l << 21)

/* What cpu_passes.py fills in. */
typedef struct {
    job_t keys; /* without what is written; tokens are those of the keys */
    int64_t query_tokens, value_dim;
    rows_t query, value, output;
    char *workspace; /* adala_workspace() bytes */
} attention_t;

/* Widths with their padding, sizes in bytes, and where things lie in the workspace of a thread and in that of all. */
typedef struct {
    int64_t features, columns;                     /* multiples of 16 */
    int64_t pair;                                  /* numbers in a word: 1 of float32, 2 of bfloat16 */
    int64_t group, groups;                         /* heads that go together, and how many times that is */
    int64_t keys, values, state, packed;           /* per head */
    int64_t own, shared;                           /* per thread, and per segment or thread */
    int64_t threads;
} plan_t;

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static plan_t get_plan(const attention_t *job) {
    plan_t plan;
    plan.features = num_features(&job->keys, job->keys.dim);
    plan.columns = round_up(job->value_dim, 16);
    plan.pair = job->keys.dtype == FLOAT32 ? 1 : 2;
    plan.keys = round_up(CHUNK / plan.pair * plan.features * 4, 64);
    plan.values = round_up(CHUNK / plan.pair * plan.columns * 4, 64);
    plan.state = round_up((plan.features * plan.columns + plan.features) * 4, 64); /* the normalizer comes last */
    plan.packed = plan.pair == 1 ? 0 : round_up(plan.features * plan.columns * 2, 64);
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

PUBLIC int64_t adala_has_fused(int64_t dim, int64_t value_dim) {
    return __builtin_cpu_supports("avx512bf16") && dim % 16 == 0 && dim <= 16 * MAX_VECTORS && value_dim <= MAX_FEATURES;
}

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

/* sign * x through a softmax. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void softmax_vectors(const __m512 *x, float sign, __m512 *out, int64_t vectors) {
    __m512 factor = _mm512_set1_ps(sign), largest = _mm512_mul_ps(x[0], factor), sum = _mm512_setzero_ps();
    for (int64_t i = 1; i < vectors; i++) largest = _mm512_max_ps(largest, _mm512_mul_ps(x[i], factor));
    largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t i = 0; i < vectors; i++) {
        out[i] = exp_vector(_mm512_fmsub_ps(x[i], factor, largest));
        sum = _mm512_add_ps(sum, out[i]);
    }
    __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < vectors; i++) out[i] = _mm512_mul_ps(out[i], inverse);
}

/* phi of a row, in vectors of 16; see `nonlinearity` in cpu_features.h. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void features_of(const job_t *job, const rows_t *rows, int64_t image, int64_t head,
                                                         int64_t token, float sign, __m512 *phi, int64_t vectors) {
    int64_t at = offset(rows, image, head, token);
    const __m512 zero = _mm512_setzero_ps(), scale = _mm512_set1_ps(job->scale);
    __m512 x[MAX_VECTORS];
    for (int64_t i = 0; i < vectors; i++) {
        if (job->dtype == FLOAT32) {
            x[i] = _mm512_loadu_ps((const float *)rows->data + at + 16 * i);
        } else {
            const __m256i *row = (const __m256i *)((const uint16_t *)rows->data + at + 16 * i);
            x[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row)), 16));
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
        const float *key_max = job->key_max + (image * job->heads + head) * job->dim;
        __m512 factor = _mm512_set1_ps(sign), largest = zero;
        for (int64_t i = 0; i < vectors; i++) x[i] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(key_max + 16 * i), x[i]);
        if (sign > 0) {
            largest = x[0];
            for (int64_t i = 1; i < vectors; i++) largest = _mm512_max_ps(largest, x[i]);
            largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        }
        for (int64_t i = 0; i < vectors; i++) phi[i] = exp_vector(_mm512_sub_ps(x[i], largest));
        break;
    }
    case SOFTMAX_PAIR:
        softmax_vectors(x, 1.0f, phi, vectors);
        softmax_vectors(x, -1.0f, phi + vectors, vectors);
        break;
    default:
        for (int64_t i = 0; i < vectors; i++) phi[i] = x[i];
    }
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

/* state (features, columns) += keys^T values, of `count` words per feature. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void add_to_state_of(int vectors, int pair, const uint32_t *keys,
                                                             const uint32_t *values, float *state, int64_t count,
                                                             int64_t features, int64_t columns) {
    for (int64_t f = 0; f < features; f += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_loadu_ps(state + (f + i) * columns + 16 * j);
        multiply(keys + f, 1, features, values, columns, count, vectors, pair, c);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(state + (f + i) * columns + 16 * j, c[i][j]);
    }
}

/* Writes rows [0, tokens) of queries times the state, `words` per row; `width` columns are left. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_output_of(int vectors, int pair, const uint32_t *queries,
                                                             const uint32_t *state, const rows_t *out, int64_t at,
                                                             int64_t tokens, int64_t words, int64_t columns, int64_t width) {
    for (int64_t token = 0; token < tokens; token += 4) {
        __m512 c[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_setzero_ps();
        multiply(queries + token * words, words, 1, state, columns, words, vectors, pair, c);
        for (int i = 0; i < 4 && token + i < tokens; i++)
            for (int j = 0; j < vectors; j++) {
                int64_t left = width - 16 * j, here = at + (token + i) * out->token_stride + 16 * j;
                __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
                if (pair == 1)
                    _mm512_mask_storeu_ps((float *)out->data + here, mask, c[i][j]);
                else
                    _mm256_mask_storeu_epi16((uint16_t *)out->data + here, mask, (__m256i)_mm512_cvtneps_pbh(c[i][j]));
            }
    }
}

#define BY_VECTORS(name, pair, ...)                                                                                    \
    switch (vectors) {                                                                                                 \
    case 1: name##_of(1, pair, __VA_ARGS__); break;                                                                    \
    case 2: name##_of(2, pair, __VA_ARGS__); break;                                                                    \
    case 3: name##_of(3, pair, __VA_ARGS__); break;                                                                    \
    default: name##_of(4, pair, __VA_ARGS__);                                                                          \
    }

/* Not inlined, this and the next: the compiler needs all registers for them. */
static __attribute__((noinline)) BFLOAT16_PROCESSOR void add_to_state(const plan_t *plan, int64_t vectors,
                                                                      const uint32_t *keys, const uint32_t *values,
                                                                      float *state, int64_t count) {
    if (plan->pair == 1)
        BY_VECTORS(add_to_state, 1, keys, values, state, count, plan->features, plan->columns)
    else
        BY_VECTORS(add_to_state, 2, keys, values, state, count, plan->features, plan->columns)
}

static __attribute__((noinline)) BFLOAT16_PROCESSOR void write_output(const plan_t *plan, int64_t vectors,
                                                                      const uint32_t *queries, const uint32_t *state,
                                                                      const rows_t *out, int64_t at, int64_t tokens,
                                                                      int64_t width) {
    if (plan->pair == 1)
        BY_VECTORS(write_output, 1, queries, state, out, at, tokens, plan->features, plan->columns, width)
    else
        BY_VECTORS(write_output, 2, queries, state, out, at, tokens, plan->features / 2, plan->columns, width)
}

/* Asks for a row that will be needed soon: the processor's own guesses end at every page, that is every few tokens. */
static ALWAYS_INLINE void prefetch(const plan_t *plan, const rows_t *rows, int64_t image, int64_t head, int64_t token,
                                   int64_t dim) {
    int64_t size = 4 / plan->pair;
    const char *row = (const char *)rows->data + size * offset(rows, image, head, token + 2);
    for (int64_t byte = 0; byte < size * dim; byte += 64) __builtin_prefetch(row + byte);
}

/* phi of keys and values of some heads, in words; sums of phi are added up. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_keys(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                                       int64_t heads, int64_t first, int64_t count, char *own, char *states,
                                                       int64_t vectors, int64_t features) {
    static const float none[MAX_FEATURES] = {0};
    const job_t *keys = &job->keys;
    __m512 phi[2][2 * MAX_VECTORS];
    for (int64_t word = 0; word * plan->pair < count; word++)
        for (int64_t h = 0; h < heads; h++) {
            const char *value[2] = {(const char *)none, (const char *)none};
            float *normalizer = (float *)(states + h * plan->state) + plan->features * plan->columns;
            for (int64_t i = 0; i < plan->pair; i++) {
                int64_t token = first + word * plan->pair + i;
                if (token >= first + count || is_padding(keys, image, token)) {
                    for (int64_t j = 0; j < features; j++) phi[i][j] = _mm512_setzero_ps();
                    continue;
                }
                prefetch(plan, &keys->input, image, head + h, token, keys->dim);
                prefetch(plan, &job->value, image, head + h, token, job->value_dim);
                features_of(keys, &keys->input, image, head + h, token, -1.0f, phi[i], vectors);
                for (int64_t j = 0; j < features; j++)
                    _mm512_storeu_ps(normalizer + 16 * j, _mm512_add_ps(_mm512_loadu_ps(normalizer + 16 * j), phi[i][j]));
                value[i] = (const char *)job->value.data + 4 / plan->pair * offset(&job->value, image, head + h, token);
            }
            uint32_t *key_words = (uint32_t *)(own + h * plan->keys) + word * plan->features;
            uint32_t *value_words = (uint32_t *)(own + plan->group * plan->keys + h * plan->values) + word * plan->columns;
            if (plan->pair == 1) {
                for (int64_t j = 0; j < features; j++) _mm512_storeu_ps(key_words + 16 * j, phi[0][j]);
                memcpy(value_words, value[0], 4 * job->value_dim);
            } else {
                const uint16_t *low = (const uint16_t *)value[0], *high = (const uint16_t *)value[1];
                pack_pairs(phi[0], phi[1], key_words, features);
                for (int64_t j = 0; j < job->value_dim; j++) value_words[j] = low[j] | (uint32_t)high[j] << 16;
            }
            for (int64_t j = job->value_dim; j < plan->columns; j++) value_words[j] = 0;
        }
}

/* Features of queries over their normalizer; words are as they lie. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_queries(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                                          int64_t heads, int64_t first, int64_t count, char *own,
                                                          const char *states, int64_t vectors, int64_t features) {
    const job_t *keys = &job->keys;
    __m512 phi[2 * MAX_VECTORS];
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < heads; h++) {
            const float *normalizer = (const float *)(states + h * plan->state) + plan->features * plan->columns;
            uint32_t *words = (uint32_t *)(own + h * plan->keys) + token * plan->features / plan->pair;
            prefetch(plan, &job->query, image, head + h, first + token, keys->dim);
            features_of(keys, &job->query, image, head + h, first + token, 1.0f, phi, vectors);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < features; j++) sum = _mm512_fmadd_ps(phi[j], _mm512_loadu_ps(normalizer + 16 * j), sum);
            float eps = keys->eps[image * keys->heads + head + h];
            __m512 inverse = _mm512_set1_ps(1.0f / (_mm512_reduce_add_ps(sum) + eps));
            for (int64_t j = 0; j < features; j++) {
                __m512 a = _mm512_mul_ps(phi[j], inverse);
                if (plan->pair == 1)
                    _mm512_storeu_ps(words + 16 * j, a);
                else
                    _mm256_storeu_si256((__m256i *)(words + 8 * j), (__m256i)_mm512_cvtneps_pbh(a));
            }
        }
}

/* The usual head_dim is known to the compiler, which then keeps rows in registers. */
#define BY_DIM(name, ...)                                                                                              \
    if (job->keys.dim == 64 && plan->features == 64)                                                                   \
        name(__VA_ARGS__, 4, 4);                                                                                       \
    else if (job->keys.dim == 64)                                                                                      \
        name(__VA_ARGS__, 4, 8);                                                                                       \
    else                                                                                                               \
        name(__VA_ARGS__, job->keys.dim / 16, plan->features / 16);

/* States of some heads over tokens [first, last). */
static BFLOAT16_PROCESSOR void reduce_keys(const attention_t *job, const plan_t *plan, int64_t image, int64_t head,
                                           int64_t heads, int64_t first, int64_t last, char *own, char *states) {
    memset(states, 0, heads * plan->state);
    for (; first < last; first += CHUNK) {
        int64_t count = last - first < CHUNK ? last - first : CHUNK;
        BY_DIM(pack_keys, job, plan, image, head, heads, first, count, own, states)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t column = 0; column < plan->columns; column += 64) {
                const uint32_t *keys = (const uint32_t *)(own + h * plan->keys);
                const uint32_t *values = (const uint32_t *)(own + plan->group * plan->keys + h * plan->values) + column;
                float *state = (float *)(states + h * plan->state) + column;
                int64_t vectors = (plan->columns - column) / 16;
                add_to_state(plan, vectors, keys, values, state, (count + plan->pair - 1) / plan->pair);
            }
    }
}

/* Adds up the states of all segments in the first, and packs it; one of float32 stays where it is. */
static BFLOAT16_PROCESSOR void pack_state(const plan_t *plan, int64_t h, int64_t segments, char *states, char *packed) {
    float *total = (float *)(states + h * plan->state);
    for (int64_t segment = 1; segment < segments; segment++) {
        const float *part = (const float *)(states + segment * plan->group * plan->state + h * plan->state);
        for (int64_t i = 0; i < plan->features * (plan->columns + 1); i++) total[i] += part[i];
    }
    for (int64_t pair = 0; plan->pair == 2 && pair < plan->features / 2; pair++) {
        uint32_t *out = (uint32_t *)(packed + h * plan->packed) + pair * plan->columns;
        for (int64_t j = 0; j < plan->columns; j += 16) {
            const float *row = total + 2 * pair * plan->columns + j;
            __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + plan->columns);
            pack_pairs(&low, &high, out + j, 1);
        }
    }
}

/* The output of some heads for tokens [first, last). */
static BFLOAT16_PROCESSOR void read_out(const attention_t *job, const plan_t *plan, int64_t image, int64_t head, int64_t heads,
                                        int64_t first, int64_t last, char *own, const char *states, const char *packed) {
    for (; first < last; first += CHUNK) {
        int64_t count = last - first < CHUNK ? last - first : CHUNK;
        BY_DIM(pack_queries, job, plan, image, head, heads, first, count, own, states)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t column = 0; column < plan->columns; column += 64) {
                const uint32_t *queries = (const uint32_t *)(own + h * plan->keys);
                const char *state = plan->pair == 1 ? states + h * plan->state : packed + h * plan->packed;
                int64_t vectors = (plan->columns - column) / 16;
                write_output(plan, vectors, queries, (const uint32_t *)state + column, &job->output,
                             offset(&job->output, image, head + h, first) + column, count, job->value_dim - column);
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

/* glibc maps what is larger than 32 MB afresh each time, and every page of 4 KB is a fault: a third of the time. */
static void ask_for_huge_pages(const attention_t *job) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const rows_t *out = &job->output;
    int64_t row = job->keys.heads * job->value_dim, bytes = job->keys.batch * job->query_tokens * row * (job->keys.dtype == FLOAT32 ? 4 : 2);
    int is_whole = out->token_stride == row && (job->keys.batch == 1 || out->batch_stride == job->query_tokens * row);
    uintptr_t start = round_up((int64_t)out->data, HUGE_PAGE), end = ((uintptr_t)out->data + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (is_whole && bytes > 16 * HUGE_PAGE) madvise((void *)start, end - start, MADV_HUGEPAGE); /* may be refused */
#endif
}

PUBLIC void adala_attention(const attention_t *job) {
    plan_t plan = get_plan(job);
    ask_for_huge_pages(job);
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

PUBLIC int64_t adala_has_fused(int64_t dim, int64_t value_dim) { return 0; }

#endif
