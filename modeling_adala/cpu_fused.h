/* Linear attention of some heads at a time, for processors that multiply bfloat16 (AVX512-BF16): what the forward pass
 * (cpu_fused.c) and the backward pass (cpu_fused_backward.c) share.
 *
 * Tokens come in chunks that stay in the caches: features are computed, packed as the processor multiplies them and used
 * up at once; nothing of them goes to memory. Sums are float32. Few heads go together, so that their states stay in the
 * caches, too.
 */

#ifndef ADALA_CPU_FUSED_H
#define ADALA_CPU_FUSED_H

#include "cpu_vectors.h"

#if defined(HAS_FUSED)
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define CHUNK 64              /* tokens, a multiple of 4 */
#define BACKWARD_CHUNK 32     /* where a token takes more memory */
#define STATE_BYTES (1 << 18) /* of the heads that go together */
#define HUGE_PAGE (1l << 21)

/* What cpu_passes.py fills in. State and normalizer are sums over the tokens. */
typedef struct {
    job_t keys; /* without what is written; tokens are those of the keys */
    int64_t query_tokens, value_dim;
    rows_t query, value, output;
    float *state;      /* (batch * heads, features, columns), see plan_t; or null */
    float *normalizer; /* (batch * heads, features); or null */
    rows_t output_gradient, query_gradient, key_gradient, value_gradient; /* backward pass alone */
    char *workspace;
} attention_t;

/* Widths with their padding, and sizes in bytes. */
typedef struct {
    int64_t features, columns;         /* dim (twice for a pair) and value_dim in whole vectors */
    int64_t pair;                      /* numbers in a word: 1 of float32, 2 of bfloat16 */
    int64_t chunk;                     /* tokens */
    int64_t group, groups;             /* heads that go together, and how many times that is */
    int64_t words, rows, products;     /* of a chunk: see scratch_t */
    int64_t scratch;                   /* all of it */
    int64_t state, packed, transposed; /* per head; a normalizer lies behind the state, a center behind the transposed */
    int64_t threads;
} plan_t;

/* What a thread works in, for one head. */
typedef struct {
    uint32_t *features; /* of a chunk, packed */
    uint32_t *pairs;    /* values, or the gradient of the output, packed over tokens */
    float *sums;        /* (features), what the chunk adds to the normalizer or to its gradient */
    uint32_t *rows;     /* the same packed along rows; backward pass alone, as what follows */
    float *products;    /* (chunk, features) */
    float *inverse;     /* (chunk), 1 / (phi_q z + eps) */
} scratch_t;

/* Some heads of an image. Tokens come in segments, one or as many as there are threads. Functions that go token by token
 * work with a copy of their own: a vector may be stored anywhere, for all the compiler knows, and it would read a shared
 * one again after every store. */
typedef struct {
    attention_t job;
    plan_t plan;
    int64_t image, head, heads, segments;
    char *own;                 /* scratch for all heads, segment after segment */
    char *states;              /* what is summed over the tokens, by head, segment after segment */
    char *packed, *transposed; /* state, packed along columns and along rows, by head */
} unit_t;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static plan_t get_plan(const attention_t *job, int is_backward) {
    plan_t plan;
    int64_t tokens = max(job->query_tokens, job->keys.tokens);
    plan.features = num_features(&job->keys, round_up(job->keys.dim, 16));
    plan.columns = round_up(job->value_dim, 16);
    plan.pair = job->keys.dtype == FLOAT32 ? 1 : 2;
    plan.chunk = min(is_backward ? BACKWARD_CHUNK : CHUNK, round_up(tokens, 4));
    plan.words = round_up(plan.chunk / plan.pair * plan.features * 4, 64);
    plan.rows = round_up(plan.chunk / plan.pair * plan.columns * 4, 64);
    plan.products = round_up(plan.chunk * plan.features * 4, 64);
    plan.scratch = plan.words + plan.rows + 4 * plan.features + (is_backward ? plan.rows + plan.products + round_up(plan.chunk * 4, 64) : 0);
    plan.state = round_up((plan.features * plan.columns + plan.features) * 4, 64);
    plan.packed = plan.pair == 1 ? 0 : round_up(plan.features * plan.columns * 2, 64);
    plan.transposed = is_backward ? round_up((plan.features / plan.pair + 1) * plan.columns * 4, 64) : 0;
#if defined(_OPENMP)
    plan.threads = omp_get_max_threads();
#else
    plan.threads = 1;
#endif
    plan.group = min(STATE_BYTES / plan.state, job->keys.heads);
    if (tokens <= plan.chunk) { /* too few for threads to share: each gets heads of its own */
        int64_t shares = (plan.threads + job->keys.batch - 1) / max(job->keys.batch, 1);
        plan.group = min(plan.group, (job->keys.heads + shares - 1) / max(shares, 1));
    }
    plan.group = max(plan.group, 1);
    plan.groups = (job->keys.heads + plan.group - 1) / plan.group;
    return plan;
}

static int64_t workspace_bytes(const plan_t *plan) {
    return plan->threads * plan->group * (plan->scratch + plan->state + plan->packed + plan->transposed);
}

static ALWAYS_INLINE scratch_t get_scratch(const unit_t *unit, int64_t segment, int64_t h) {
    const plan_t *plan = &unit->plan;
    char *at = unit->own + (segment * plan->group + h) * plan->scratch;
    char *pairs = at + plan->words, *sums = pairs + plan->rows, *rows = sums + 4 * plan->features, *products = rows + plan->rows;
    scratch_t scratch = {(uint32_t *)at,  (uint32_t *)pairs,   (float *)sums,
                         (uint32_t *)rows, (float *)products, (float *)(products + plan->products)};
    return scratch;
}

static ALWAYS_INLINE float *get_state(const unit_t *unit, int64_t segment, int64_t h) {
    return (float *)(unit->states + (segment * unit->plan.group + h) * unit->plan.state);
}

static ALWAYS_INLINE float *get_normalizer(const unit_t *unit, int64_t segment, int64_t h) {
    return get_state(unit, segment, h) + unit->plan.features * unit->plan.columns;
}

static ALWAYS_INLINE uint32_t *get_transposed(const unit_t *unit, int64_t h) {
    return (uint32_t *)(unit->transposed + h * unit->plan.transposed);
}

/* (columns) */
static ALWAYS_INLINE float *get_center(const unit_t *unit, int64_t h) {
    return (float *)get_transposed(unit, h) + unit->plan.features / unit->plan.pair * unit->plan.columns;
}

/* Before and after the tokens of a chunk. */
static void clear_sums(const unit_t *unit, int64_t segment) {
    for (int64_t h = 0; h < unit->heads; h++) memset(get_scratch(unit, segment, h).sums, 0, 4 * unit->plan.features);
}

static void add_sums(const unit_t *unit, int64_t segment) {
    for (int64_t h = 0; h < unit->heads; h++) {
        float *total = get_normalizer(unit, segment, h), *sums = get_scratch(unit, segment, h).sums;
        for (int64_t f = 0; f < unit->plan.features; f++) total[f] += sums[f];
    }
}

/* The state that writes the output, or whatever is a product of features and a state. */
static ALWAYS_INLINE const uint32_t *get_packed(const unit_t *unit, int64_t h) {
    return unit->plan.pair == 1 ? (const uint32_t *)get_state(unit, 0, h) : (const uint32_t *)(unit->packed + h * unit->plan.packed);
}

/* Calls a function for 64 columns at a time, of which it gets the number of vectors; not inlined, because the compiler
 * needs all registers for it. */
#define BY_VECTORS(name, pair, ...)                                                                                    \
    switch (vectors) {                                                                                                 \
    case 1: name##_of(1, pair, __VA_ARGS__); break;                                                                    \
    case 2: name##_of(2, pair, __VA_ARGS__); break;                                                                    \
    case 3: name##_of(3, pair, __VA_ARGS__); break;                                                                    \
    default: name##_of(4, pair, __VA_ARGS__);                                                                          \
    }
#define BY_COLUMNS(name, width, ...)                                                                                   \
    for (int64_t column = 0; column < (width); column += 64) {                                                         \
        int64_t vectors = ((width) - column) / 16;                                                                     \
        if (plan->pair == 1)                                                                                           \
            BY_VECTORS(name, 1, __VA_ARGS__)                                                                           \
        else                                                                                                           \
            BY_VECTORS(name, 2, __VA_ARGS__)                                                                           \
    }

static __attribute__((noinline)) BFLOAT16_PROCESSOR void add_to_state(const plan_t *plan, const scratch_t *scratch,
                                                                      float *state, int64_t tokens) {
    int64_t words = (tokens + plan->pair - 1) / plan->pair;
    BY_COLUMNS(add_to_state, plan->columns, scratch->features, scratch->pairs + column, state + column, words,
               plan->features, plan->columns)
}

static __attribute__((noinline)) BFLOAT16_PROCESSOR void write_rows(const plan_t *plan, const scratch_t *scratch,
                                                                    const uint32_t *state, const rows_t *out, int64_t at,
                                                                    int64_t tokens, int64_t width) {
    BY_COLUMNS(write_rows, plan->columns, scratch->features, state + column, out, at + column, tokens,
               plan->features / plan->pair, plan->columns, width - column)
}

static __attribute__((noinline)) BFLOAT16_PROCESSOR void write_products(const plan_t *plan, const scratch_t *scratch,
                                                                        const uint32_t *transposed, int64_t tokens) {
    BY_COLUMNS(write_products, plan->features, scratch->rows, transposed + column, scratch->products + column, tokens,
               plan->columns / plan->pair, plan->features)
}

/* Asks for a row that will be needed soon: the processor's own guesses end at every page, that is every few tokens. */
static ALWAYS_INLINE void prefetch(const plan_t *plan, const rows_t *rows, int64_t image, int64_t head, int64_t token,
                                   int64_t dim) {
    int64_t size = 4 / plan->pair;
    const char *row = (const char *)rows->data + size * offset(rows, image, head, token + 2);
    for (int64_t byte = 0; byte < size * dim; byte += 64) __builtin_prefetch(row + byte);
}

/* A row of numbers, along itself. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_row(const plan_t *plan, const __m512 *row, uint32_t *words, int64_t vectors) {
    for (int64_t j = 0; j < vectors; j++)
        if (plan->pair == 1)
            _mm512_storeu_ps(words + 16 * j, row[j]);
        else
            _mm256_storeu_si256((__m256i *)(words + 8 * j), (__m256i)_mm512_cvtneps_pbh(row[j]));
}

/* The rows of a word of tokens. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_tokens(const plan_t *plan, __m512 rows[2][2 * MAX_VECTORS], uint32_t *words,
                                                         int64_t vectors) {
    if (plan->pair == 1)
        pack_row(plan, rows[0], words, vectors);
    else
        pack_pairs(rows[0], rows[1], words, vectors);
}

/* Rows of `width` numbers of a word of tokens, with zeros behind. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void interleave(const plan_t *plan, const char *const rows[2], int64_t width, uint32_t *words) {
    const uint16_t *low = (const uint16_t *)rows[0], *high = (const uint16_t *)rows[1];
    if (plan->pair == 1)
        memcpy(words, rows[0], 4 * width);
    else
        for (int64_t j = 0; j < width; j++) words[j] = low[j] | (uint32_t)high[j] << 16;
    for (int64_t j = width; j < plan->columns; j++) words[j] = 0;
}

static ALWAYS_INLINE const char *get_row(const plan_t *plan, const rows_t *rows, int64_t image, int64_t head, int64_t token) {
    return (const char *)rows->data + 4 / plan->pair * offset(rows, image, head, token);
}

/* phi of a query over its normalizer; returns what it was multiplied by. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR float normalize(__m512 *phi, const float *normalizer, float eps, int64_t features) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < features; j++) sum = _mm512_fmadd_ps(phi[j], _mm512_loadu_ps(normalizer + 16 * j), sum);
    float inverse = 1.0f / (_mm512_reduce_add_ps(sum) + eps);
    for (int64_t j = 0; j < features; j++) phi[j] = _mm512_mul_ps(phi[j], _mm512_set1_ps(inverse));
    return inverse;
}

/* Adds up the states of all segments in the first. */
static BFLOAT16_PROCESSOR void add_segments(const unit_t *unit, int64_t h) {
    float *total = get_state(unit, 0, h);
    for (int64_t segment = 1; segment < unit->segments; segment++) {
        const float *part = get_state(unit, segment, h);
        for (int64_t i = 0; i < unit->plan.features * (unit->plan.columns + 1); i++) total[i] += part[i];
    }
}

/* Packs the state of the first segment; one of float32 stays where it is. */
static BFLOAT16_PROCESSOR void pack_state(const unit_t *unit, int64_t h) {
    const plan_t *plan = &unit->plan;
    const float *state = get_state(unit, 0, h);
    for (int64_t pair = 0; plan->pair == 2 && pair < plan->features / 2; pair++) {
        uint32_t *out = (uint32_t *)(unit->packed + h * plan->packed) + pair * plan->columns;
        for (int64_t j = 0; j < plan->columns; j += 16) {
            const float *row = state + 2 * pair * plan->columns + j;
            __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + plan->columns);
            pack_pairs(&low, &high, out + j, 1);
        }
    }
}

/* The usual widths are known to the compiler, which then keeps rows in registers. */
#define OF_DIM(width, name, ...)                                                                                       \
    case width:                                                                                                        \
        if (plan->features < 2 * (width))                                                                              \
            name(__VA_ARGS__, width, ((width) + 15) / 16);                                                             \
        else                                                                                                           \
            name(__VA_ARGS__, width, ((width) + 15) / 16 * 2);                                                         \
        break;
#define BY_DIM(name, ...)                                                                                              \
    switch (job->keys.dim) {                                                                                           \
        OF_DIM(64, name, __VA_ARGS__)                                                                                  \
        OF_DIM(72, name, __VA_ARGS__)                                                                                  \
        OF_DIM(80, name, __VA_ARGS__)                                                                                  \
    default:                                                                                                           \
        name(__VA_ARGS__, job->keys.dim, plan->features / 16);                                                         \
    }

/* Where a segment begins: at whole fours of tokens. */
static int64_t bound(int64_t tokens, int64_t segment, int64_t segments) {
    int64_t step = round_up((tokens + segments - 1) / segments, 4);
    return min(segment * step, tokens);
}

/* glibc maps what is larger than 32 MB afresh each time, and every page of 4 KB is a fault: a third of the time. */
static void ask_for_huge_pages(const attention_t *job, const rows_t *out, int64_t tokens, int64_t dim) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    int64_t row = job->keys.heads * dim, bytes = job->keys.batch * tokens * row * (job->keys.dtype == FLOAT32 ? 4 : 2);
    int is_whole = out->token_stride == row && (job->keys.batch == 1 || out->batch_stride == tokens * row);
    uintptr_t start = round_up((int64_t)out->data, HUGE_PAGE), end = ((uintptr_t)out->data + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (is_whole && bytes > 16 * HUGE_PAGE) madvise((void *)start, end - start, MADV_HUGEPAGE); /* may be refused */
#endif
}

/* What a pass does, in this order: with each head, each segment, each head again, and each segment again. */
typedef struct {
    void (*prepare)(const unit_t *, int64_t h);
    void (*reduce)(const unit_t *, int64_t segment);
    void (*pack)(const unit_t *, int64_t h);
    void (*write)(const unit_t *, int64_t segment);
} pass_t;

static unit_t get_unit(const attention_t *job, const plan_t *plan, int64_t number, int64_t thread, int64_t segments) {
    int64_t head = number % plan->groups * plan->group, heads = min(plan->group, job->keys.heads - head);
    unit_t unit = {*job, *plan, number / plan->groups, head, heads, segments, 0, 0, 0, 0};
    int64_t sizes[] = {plan->scratch, plan->state, plan->packed, plan->transposed};
    char **places[] = {&unit.own, &unit.states, &unit.packed, &unit.transposed}, *at = job->workspace;
    for (int i = 0; i < 4; i++) {
        *places[i] = at + thread * plan->group * sizes[i];
        at += plan->threads * plan->group * sizes[i];
    }
    return unit;
}

static void run(const attention_t *job, const plan_t *plan, const pass_t *pass) {
    int64_t units = job->keys.batch * plan->groups, segments = plan->threads;
    if (units >= plan->threads) { /* every thread has images or heads of its own */
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < units; i++) {
            int64_t thread = 0;
#if defined(_OPENMP)
            thread = omp_get_thread_num();
#endif
            unit_t unit = get_unit(job, plan, i, thread, 1);
            for (int64_t h = 0; pass->prepare && h < unit.heads; h++) pass->prepare(&unit, h);
            pass->reduce(&unit, 0);
            for (int64_t h = 0; h < unit.heads; h++) pass->pack(&unit, h);
            pass->write(&unit, 0);
        }
        return;
    }
    for (int64_t i = 0; i < units; i++) { /* threads share the tokens of each */
        unit_t unit = get_unit(job, plan, i, 0, segments);
        _Pragma("omp parallel") {
            if (pass->prepare)
                _Pragma("omp for schedule(static)") for (int64_t h = 0; h < unit.heads; h++) pass->prepare(&unit, h);
            _Pragma("omp for schedule(static)") for (int64_t s = 0; s < segments; s++) pass->reduce(&unit, s);
            _Pragma("omp for schedule(static)") for (int64_t h = 0; h < unit.heads; h++) pass->pack(&unit, h);
            _Pragma("omp for schedule(static)") for (int64_t s = 0; s < segments; s++) pass->write(&unit, s);
        }
    }
}

#endif
#endif
