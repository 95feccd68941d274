/* The whole forward pass of linear attention in one call; see cpu_fused.h. */

#include "cpu_fused.h"

#if defined(HAS_FUSED)

/* phi of keys and values in words of tokens; sums of phi are added up. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_keys(const unit_t *all, int64_t segment, int64_t first, int64_t count,
                                                       int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    static const float none[MAX_FEATURES] = {0};
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    const job_t *keys = &job->keys;
    __m512 phi[2][2 * MAX_VECTORS];
    for (int64_t word = 0; word * plan->pair < count; word++)
        for (int64_t h = 0; h < unit->heads; h++) {
            const char *values[2] = {(const char *)none, (const char *)none};
            scratch_t scratch = get_scratch(unit, segment, h);
            for (int64_t i = 0; i < plan->pair; i++) {
                int64_t token = first + word * plan->pair + i;
                if (token >= first + count || is_padding(keys, unit->image, token)) {
                    for (int64_t j = 0; j < features; j++) phi[i][j] = _mm512_setzero_ps();
                    continue;
                }
                prefetch(plan, &keys->input, unit->image, unit->head + h, token, dim);
                prefetch(plan, &job->value, unit->image, unit->head + h, token, job->value_dim);
                features_of(keys, &keys->input, unit->image, unit->head + h, token, -1.0f, phi[i], dim);
                for (int64_t j = 0; j < features; j++)
                    _mm512_storeu_ps(scratch.sums + 16 * j, _mm512_add_ps(_mm512_loadu_ps(scratch.sums + 16 * j), phi[i][j]));
                values[i] = get_row(plan, &job->value, unit->image, unit->head + h, token);
            }
            pack_tokens(plan, phi, scratch.features + word * plan->features, features);
            interleave(plan, values, job->value_dim, scratch.pairs + word * plan->columns);
        }
}

/* phi of queries over their normalizer, in words along rows. */
static ALWAYS_INLINE BFLOAT16_PROCESSOR void pack_queries(const unit_t *all, int64_t segment, int64_t first, int64_t count,
                                                          int64_t dim, int64_t features) {
    const unit_t own = *all, *unit = &own;
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    const job_t *keys = &job->keys;
    __m512 phi[2 * MAX_VECTORS];
    for (int64_t token = 0; token < count; token++)
        for (int64_t h = 0; h < unit->heads; h++) {
            prefetch(plan, &job->query, unit->image, unit->head + h, first + token, dim);
            features_of(keys, &job->query, unit->image, unit->head + h, first + token, 1.0f, phi, dim);
            normalize(phi, get_normalizer(unit, 0, h), keys->eps[unit->image * keys->heads + unit->head + h], features);
            pack_row(plan, phi, get_scratch(unit, segment, h).features + token * plan->features / plan->pair, features);
        }
}

/* The states over a segment of the keys. */
static BFLOAT16_PROCESSOR void reduce_keys(const unit_t *unit, int64_t segment) {
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    int64_t first = bound(job->keys.tokens, segment, unit->segments), last = bound(job->keys.tokens, segment + 1, unit->segments);
    memset(get_state(unit, segment, 0), 0, unit->heads * plan->state);
    for (; first < last; first += plan->chunk) {
        int64_t count = min(plan->chunk, last - first);
        clear_sums(unit, segment);
        BY_DIM(pack_keys, unit, segment, first, count)
        add_sums(unit, segment);
        for (int64_t h = 0; h < unit->heads; h++) {
            scratch_t scratch = get_scratch(unit, segment, h);
            add_to_state(plan, &scratch, get_state(unit, segment, h), count);
        }
    }
}

static void finish_state(const unit_t *unit, int64_t h) {
    const plan_t *plan = &unit->plan;
    int64_t index = unit->image * unit->job.keys.heads + unit->head + h, numbers = plan->features * plan->columns;
    add_segments(unit, h);
    pack_state(unit, h);
    if (unit->job.state) {
        memcpy(unit->job.state + index * numbers, get_state(unit, 0, h), 4 * numbers);
        memcpy(unit->job.normalizer + index * plan->features, get_normalizer(unit, 0, h), 4 * plan->features);
    }
}

/* The output for a segment of the queries. */
static BFLOAT16_PROCESSOR void read_out(const unit_t *unit, int64_t segment) {
    const attention_t *job = &unit->job;
    const plan_t *plan = &unit->plan;
    int64_t first = bound(job->query_tokens, segment, unit->segments), last = bound(job->query_tokens, segment + 1, unit->segments);
    for (; first < last; first += plan->chunk) {
        int64_t count = min(plan->chunk, last - first);
        BY_DIM(pack_queries, unit, segment, first, count)
        for (int64_t h = 0; h < unit->heads; h++) {
            scratch_t scratch = get_scratch(unit, segment, h);
            int64_t at = offset(&job->output, unit->image, unit->head + h, first);
            write_rows(plan, &scratch, get_packed(unit, h), &job->output, at, count, job->value_dim);
        }
    }
}

PUBLIC void adala_attention(const attention_t *job) {
    static const pass_t pass = {0, reduce_keys, finish_state, read_out};
    plan_t plan = get_plan(job, 0);
    ask_for_huge_pages(job, &job->output, job->query_tokens, job->value_dim);
    run(job, &plan, &pass);
}

PUBLIC int64_t adala_workspace(const attention_t *job, int64_t is_backward) {
    plan_t plan = get_plan(job, (int)is_backward);
    return workspace_bytes(&plan);
}

PUBLIC int64_t adala_has_fused(int64_t dim, int64_t value_dim) {
    return __builtin_cpu_supports("avx512bf16") && dim <= 16 * MAX_VECTORS && value_dim <= MAX_FEATURES;
}

#else

PUBLIC int64_t adala_has_fused(int64_t dim, int64_t value_dim) { return 0; }

#endif
