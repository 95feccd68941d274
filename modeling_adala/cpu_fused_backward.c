/* The whole backward pass of linear attention in one call; see cpu_fused.h.
 *
 * With a = phi_q / d, d = phi_q z + eps, the gradient dO of the output, G = dO S^T and c = a G, one pass over the queries:
 *
 *     dS = a^T dO        dz = -sum of c a        dphi_q = (G - c z) / d
 *
 * and one over the keys: dv = phi_k dS, dphi_k = v dS^T + dz. Features are computed again. S and v are taken less what is
 * common to all values, see `center_state`.
 */

#include "cpu_fused.h"

#if defined(HAS_FUSED)

/* Packs a row of a state along itself, among the columns of the transposed state; leaves it rounded. */
static void transpose_row(const unit_t *unit, int64_t h, int64_t feature, float *row) {
    const plan_t *plan = &unit->plan;
    uint32_t words[MAX_FEATURES], *out = get_transposed(unit, h) + feature;
    store_row(row, words, 0, unit->job.keys.dtype, plan->columns);
    load_row(words, 0, unit->job.keys.dtype, 1.0f, row, plan->columns);
    for (int64_t j = 0; j < plan->columns / plan->pair; j++) out[j * plan->features] = words[j];
}

/* The state less z m^T, m = S^T z / (z z). Gradients of queries and keys are those of values less m, but for what eps
 * does; S may be almost all z m^T, of which rounding would leave nothing true. */
static void center_state(const unit_t *unit, int64_t h) {
    const plan_t *plan = &unit->plan;
    int64_t index = unit->image * unit->job.keys.heads + unit->head + h;
    const float *state = unit->job.state + index * plan->features * plan->columns;
    const float *normalizer = unit->job.normalizer + index * plan->features;
    float row[MAX_FEATURES], *center = get_center(unit, h), squares = dot(normalizer, normalizer, plan->features);
    memset(center, 0, 4 * plan->columns);
    for (int64_t f = 0; f < plan->features && squares > 1e-37f; f++)
        for (int64_t j = 0; j < plan->columns; j++) center[j] += normalizer[f] / squares * state[f * plan->columns + j];
    for (int64_t f = 0; f < plan->features; f++) {
        for (int64_t j = 0; j < plan->columns; j++) row[j] = state[f * plan->columns + j] - normalizer[f] * center[j];
        transpose_row(unit, h, f, row);
    }
}

/* Products with values are taken of the rounded dS, so that what they have of m is taken from dz. */
static void finish_gradient(const unit_t *unit, int64_t h) {
    const plan_t *plan = &unit->plan;
    float row[MAX_FEATURES];
    add_segments(unit, h);
    pack_state(unit, h);
    for (int64_t f = 0; f < plan->features; f++) {
        memcpy(row, get_state(unit, 0, h) + f * plan->columns, 4 * plan->columns);
        transpose_row(unit, h, f, row);
        get_normalizer(unit, 0, h)[f] -= dot(row, get_center(unit, h), plan->columns);
    }
}

/* A row of numbers as it lies, with zeros behind. */
static ALWAYS_INLINE void copy_row(const plan_t *plan, const char *row, int64_t width, uint32_t *words) {
    int64_t size = 4 / plan->pair;
    memcpy(words, row, size * width);
    memset((char *)words + size * width, 0, size * (plan->columns - width));
}

/* Features of queries over their normalizer, and the gradient of the output, in words of tokens and the latter along rows,
 * too. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_queries(const unit_t *all, int64_t segment, int64_t first, int64_t count,
                                                          int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    static const float none[MAX_FEATURES] = {0};
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    const job_t *keys = &job->keys;
    __m512 phi[2][2 * MAX_VECTORS];
    for (int64_t word = 0; word * plan->pair < count; word++)
        for (int64_t h = 0; h < unit->heads; h++) {
            const char *rows[2] = {(const char *)none, (const char *)none};
            int64_t head = unit->head + h, index = unit->image * keys->heads + head;
            scratch_t scratch = get_scratch(unit, segment, h);
            for (int64_t i = 0; i < plan->pair; i++) {
                int64_t token = word * plan->pair + i;
                if (token >= count) {
                    for (int64_t j = 0; j < features; j++) phi[i][j] = _mm512_setzero_ps();
                    continue;
                }
                prefetch(plan, &job->query, unit->image, head, first + token, dim);
                prefetch(plan, &job->output_gradient, unit->image, head, first + token, job->value_dim);
                features_of(keys, &job->query, unit->image, head, first + token, 1.0f, phi[i], dim);
                scratch.inverse[token] = normalize(phi[i], job->normalizer + index * plan->features, keys->eps[index], features);
                rows[i] = get_row(plan, &job->output_gradient, unit->image, head, first + token);
                copy_row(plan, rows[i], job->value_dim, scratch.rows + token * plan->columns / plan->pair);
            }
            pack_tokens(plan, phi, scratch.features + word * plan->features, features);
            interleave(plan, rows, job->value_dim, scratch.pairs + word * plan->columns);
        }
}

static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_query_gradient(const unit_t *all, int64_t segment, int64_t first,
                                                                  int64_t count, int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    const job_t *keys = &job->keys;
    int64_t numbers = 16 * features, width = (dim + 15) / 16 * 16;
    float a[32 * MAX_VECTORS], gradient[32 * MAX_VECTORS], out[16 * MAX_VECTORS], incoming[MAX_FEATURES];
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < unit->heads; h++) {
            int64_t head = unit->head + h, index = unit->image * keys->heads + head;
            scratch_t scratch = get_scratch(unit, segment, h);
            const uint32_t *words = scratch.features + token / plan->pair * numbers;
            const float *products = scratch.products + token * numbers, *normalizer = job->normalizer + index * numbers;
            for (int64_t i = 0; i < numbers; i++) { /* the number of this token */
                uint32_t bits = plan->pair == 1 ? words[i] : token % 2 ? words[i] & 0xffff0000 : words[i] << 16;
                memcpy(a + i, &bits, 4);
            }
            load_row(scratch.rows, token * plan->columns, keys->dtype, 1.0f, incoming, plan->columns);
            float inverse = scratch.inverse[token], denominator = 1.0f / inverse;
            float of_center = dot(incoming, get_center(unit, h), plan->columns);
            float c = dot(a, products, numbers) - of_center * keys->eps[index] * inverse;
            for (int64_t i = 0; i < numbers; i++) {
                scratch.sums[i] -= c * a[i];
                gradient[i] = (products[i] - c * normalizer[i]) * inverse;
                a[i] *= denominator;
            }
            nonlinearity_gradient(keys, width, a, gradient, out);
            store_row(out, job->query_gradient.data, offset(&job->query_gradient, unit->image, head, first + token), keys->dtype, dim);
        }
}

/* The gradients of a segment of the queries, and what they add to that of the state. */
static BFLOAT16_PROCESSOR void reduce_queries(const unit_t *unit, int64_t segment) {
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    int64_t first = bound(job->query_tokens, segment, unit->segments), last = bound(job->query_tokens, segment + 1, unit->segments);
    memset(get_state(unit, segment, 0), 0, unit->heads * plan->state);
    for (; first < last; first += plan->chunk) {
        int64_t count = min(plan->chunk, last - first);
        BY_DIM(pack_queries, unit, segment, first, count)
        for (int64_t h = 0; h < unit->heads; h++) {
            scratch_t scratch = get_scratch(unit, segment, h);
            add_to_state(plan, &scratch, get_state(unit, segment, h), count);
            write_products(plan, &scratch, get_transposed(unit, h), count);
        }
        clear_sums(unit, segment);
        BY_DIM(write_query_gradient, unit, segment, first, count)
        add_sums(unit, segment);
    }
}

/* Features of keys, zero for padding, and values, in words along rows. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_keys(const unit_t *all, int64_t segment, int64_t first, int64_t count,
                                                       int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    const job_t *keys = &job->keys;
    __m512 phi[2 * MAX_VECTORS];
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < unit->heads; h++) {
            int64_t head = unit->head + h;
            scratch_t scratch = get_scratch(unit, segment, h);
            prefetch(plan, &keys->input, unit->image, head, first + token, dim);
            prefetch(plan, &job->value, unit->image, head, first + token, job->value_dim);
            if (is_padding(keys, unit->image, first + token))
                for (int64_t j = 0; j < features; j++) phi[j] = _mm512_setzero_ps();
            else
                features_of(keys, &keys->input, unit->image, head, first + token, -1.0f, phi, dim);
            pack_row(plan, phi, scratch.features + token * plan->features / plan->pair, features);
            const char *value = get_row(plan, &job->value, unit->image, head, first + token);
            copy_row(plan, value, job->value_dim, scratch.rows + token * plan->columns / plan->pair);
        }
}

static ALWAYS_INLINE BFLOAT16_PROCESSOR void write_key_gradient(const unit_t *all, int64_t segment, int64_t first,
                                                                int64_t count, int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    const attention_t *job = &unit->job;
    const job_t *keys = &job->keys;
    int64_t numbers = 16 * features, width = (dim + 15) / 16 * 16;
    float phi[32 * MAX_VECTORS], gradient[32 * MAX_VECTORS], out[16 * MAX_VECTORS];
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < unit->heads; h++) {
            scratch_t scratch = get_scratch(unit, segment, h);
            const float *products = scratch.products + token * numbers, *of_normalizer = get_normalizer(unit, 0, h);
            if (is_padding(keys, unit->image, first + token)) {
                memset(out, 0, sizeof(float) * width);
            } else {
                load_row(scratch.features, token * numbers, keys->dtype, 1.0f, phi, numbers);
                for (int64_t i = 0; i < numbers; i++) gradient[i] = products[i] + of_normalizer[i];
                nonlinearity_gradient(keys, width, phi, gradient, out);
            }
            int64_t at = offset(&job->key_gradient, unit->image, unit->head + h, first + token);
            store_row(out, job->key_gradient.data, at, keys->dtype, dim);
        }
}

/* The gradients of a segment of the keys and values. */
static BFLOAT16_PROCESSOR void write_gradients(const unit_t *unit, int64_t segment) {
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    int64_t first = bound(job->keys.tokens, segment, unit->segments), last = bound(job->keys.tokens, segment + 1, unit->segments);
    for (; first < last; first += plan->chunk) {
        int64_t count = min(plan->chunk, last - first);
        BY_DIM(pack_keys, unit, segment, first, count)
        for (int64_t h = 0; h < unit->heads; h++) {
            scratch_t scratch = get_scratch(unit, segment, h);
            int64_t at = offset(&job->value_gradient, unit->image, unit->head + h, first);
            write_rows(plan, &scratch, get_packed(unit, h), &job->value_gradient, at, count, job->value_dim);
            write_products(plan, &scratch, get_transposed(unit, h), count);
        }
        BY_DIM(write_key_gradient, unit, segment, first, count)
    }
}

PUBLIC void adala_attention_gradient(const attention_t *job) {
    static const pass_t pass = {center_state, reduce_queries, finish_gradient, write_gradients};
    plan_t plan = get_plan(job, 1);
    ask_for_huge_pages(job, &job->query_gradient, job->query_tokens, job->keys.dim);
    ask_for_huge_pages(job, &job->key_gradient, job->keys.tokens, job->keys.dim);
    ask_for_huge_pages(job, &job->value_gradient, job->keys.tokens, job->value_dim);
    run(job, &plan, &pass);
}

#endif
