"""Triton kernels of bidirectional linear attention; `triton_backend.py` launches them.

Notation of one head: `phi` are features, `state` is phi(K)^T V, `key_sum` is phi(K)^T 1, and N counts real tokens.

    state_kernel            records of the state: one per split of the tokens
    output_kernel           adds the records up, then output = phi(q) state / (phi(q) key_sum + eps)
    query_gradient_kernel   gradient of the query, and records of the gradients of state and key_sum
    key_gradient_kernel     adds those up, then gradients of key and value

- A *record* is what a program leaves for others, in float32: `[state | key_sum | value_sum | count]`, not
  divided by the count yet. One program writes one record, and readers add records in order: sums are deterministic.
- Values are centered. Weights sum to w = phi(q) z / (phi(q) z + eps), so that the output is w times the mean value and
  attention to what deviates from it; gradients follow. These are identities, not approximations, and 16-bit products
  then round deviations only.
- Columns of the value do not depend on each other. Where features x value_dim outgrow a tile, the columns are cut into
  chunks: over programs in the forward pass, and one after another in the backward pass, which sums over them.
"""

import triton
import triton.language as tl


@triton.jit
def _operand(x, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    x = x.to(DOT)
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        x = x.to(tl.float32)
    return x


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")  # of float32 operands: three products, to float32's own precision


@triton.jit
def _add_dot(total, a, b):
    if a.dtype == tl.float32:
        # Tensor cores round sums toward zero, which adds up over many tokens: here they sum no more than one block.
        return total + tl.dot(a, b, input_precision="tf32x3", max_num_imprecise_acc=1)
    return tl.dot(a, b, total)


@triton.jit
def _phi(x, PHI: tl.constexpr):
    # where, and not maximum, because that would hide a NaN
    if PHI == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(x))
    elif PHI != "identity":
        x = tl.where(x <= 0, 0.0, x)
    if PHI == "relu3":
        x = x * x * x
    if PHI == "relu2" or PHI == "relu4":
        x = x * x
    if PHI == "relu4":
        x = x * x
    return x


@triton.jit
def _through_phi(gradient, x, phi, PHI: tl.constexpr):
    """Return the gradient of x from that of phi(x)."""
    if PHI == "elu":
        gradient = tl.where(x > 0, gradient, gradient * phi)
    elif PHI != "identity":
        gradient = tl.where(x > 0, gradient, 0.0)
    if PHI == "relu2":
        gradient *= 2 * x
    elif PHI == "relu3":
        gradient *= 3 * x * x
    elif PHI == "relu4":
        gradient *= 4 * x * x * x
    return gradient


@triton.jit
def _tokens_of_part(cu_seqlens, image, tokens, part, parts, BLOCK_N: tl.constexpr):
    """Return the first and the last token, exclusive, of the given part of an image, or of a packed sequence."""
    begin, end = 0, tokens
    if cu_seqlens is not None:
        begin, end = tl.load(cu_seqlens + image), tl.load(cu_seqlens + image + 1)
    length = tl.cdiv(tl.cdiv(end - begin, parts), BLOCK_N) * BLOCK_N
    first = begin + part * length
    return first, tl.minimum(first + length, end)


@triton.jit
def _offsets(rows, columns, row_stride, column_stride):
    # 10^6 tokens times the stride of a fused projection pass 2^31
    return rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def _load(pointer, rows, columns, row_stride, column_stride, row_mask, WIDTH: tl.constexpr):
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + _offsets(rows, columns, row_stride, column_stride), mask=mask, other=0.0)


@triton.jit
def _store(pointer, x, rows, columns, row_stride, column_stride, row_mask, WIDTH: tl.constexpr):
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    pointers = pointer + _offsets(rows, columns, row_stride, column_stride)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_record(record, state, key_sum, value_sum, count, features, columns, F: tl.constexpr, V: tl.constexpr):
    in_features, in_columns = features < F, columns < V
    tile = features[:, None] * V + columns[None, :]
    tl.store(record + tile, state, mask=in_features[:, None] & in_columns[None, :])
    tl.store(record + F * V + features, key_sum, mask=in_features)
    tl.store(record + F * V + F + columns, value_sum, mask=in_columns)
    tl.store(record + F * V + F + V + tl.arange(0, 4), tl.zeros([4], tl.float32) + count)


@triton.jit
def _sum_records(records, splits, features, columns, F: tl.constexpr, V: tl.constexpr, RECORD: tl.constexpr):
    """Return the sums of `splits` records."""
    in_features, in_columns = features < F, columns < V
    tile = features[:, None] * V + columns[None, :]
    in_tile = in_features[:, None] & in_columns[None, :]
    state = tl.zeros_like(tile).to(tl.float32)
    key_sum = tl.zeros_like(features).to(tl.float32)
    value_sum = tl.zeros_like(columns).to(tl.float32)
    count = 0.0
    for split in range(splits):
        record = records + split * RECORD
        state += tl.load(record + tile, mask=in_tile, other=0.0)
        key_sum += tl.load(record + F * V + features, mask=in_features, other=0.0)
        value_sum += tl.load(record + F * V + F + columns, mask=in_columns, other=0.0)
        count += tl.load(record + F * V + F + V)
    return state, key_sum, value_sum, count


@triton.jit
def _centered_means(state, key_sum, value_sum, count):
    """Return S - z v', z and v', where S and z are means over the tokens, and v' is the mean value."""
    count = tl.maximum(count, 1.0)
    key_mean, value_mean = key_sum / count, value_sum / count
    return state / count - key_mean[:, None] * value_mean[None, :], key_mean, value_mean


@triton.jit(do_not_specialize=["tokens", "splits"])
def state_kernel(
    key, value, key_mask, cu_seqlens, records,
    scale, tokens, heads, splits,
    key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, mask_b, mask_n,
    PHI: tl.constexpr, F: tl.constexpr, V: tl.constexpr, RECORD: tl.constexpr,
    DOT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: (images x heads, splits, chunks of value columns)."""
    image_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    features = tl.arange(0, BLOCK_F)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)

    state = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    key_sum = tl.zeros([BLOCK_F], tl.float32)
    value_sum = tl.zeros([BLOCK_V], tl.float32)
    count = 0.0
    first, last = _tokens_of_part(cu_seqlens, image, tokens, split, splits, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        real = rows < last
        if key_mask is not None:
            real &= tl.load(key_mask + image * mask_b + rows.to(tl.int64) * mask_n, mask=real, other=0) != 0
        x = _load(key, rows, features, key_n, key_d, real, F).to(tl.float32) * scale
        v = _load(value, rows, columns, value_n, value_d, real, V)
        phi = _operand(tl.where(real[:, None], _phi(x, PHI), 0.0), DOT, INTERPRETED)
        state = _add_dot(state, tl.trans(phi), _operand(v, DOT, INTERPRETED))
        # of the rounded features, as in the state: the weights of the mean then sum to one
        key_sum += tl.sum(phi.to(tl.float32), axis=0)
        value_sum += tl.sum(v.to(tl.float32), axis=0)
        count += tl.sum(real.to(tl.float32), axis=0)
    records += (image_head * splits + split) * RECORD
    _store_record(records, state, key_sum, value_sum, count, features, columns, F, V)


@triton.jit(do_not_specialize=["query_tokens", "splits", "parts"])
def output_kernel(
    query, cu_seqlens, records, totals, output,
    scale, eps, query_tokens, heads, splits, parts,
    query_b, query_h, query_n, query_d,
    output_b, output_h, output_n, output_d,
    PHI: tl.constexpr, F: tl.constexpr, V: tl.constexpr, RECORD: tl.constexpr,
    DOT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: (images x heads, parts of the queries, chunks of value columns). `totals` get the sum of the records."""
    image_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    query += image * query_b + head * query_h
    output += image * output_b + head * output_h
    features = tl.arange(0, BLOCK_F)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)

    records += image_head * splits * RECORD
    state, key_sum, value_sum, count = _sum_records(records, splits, features, columns, F, V, RECORD)
    if part == 0:
        total = totals + image_head * RECORD
        _store_record(total, state, key_sum, value_sum, count, features, columns, F, V)
    state, key_mean, value_mean = _centered_means(state, key_sum, value_sum, count)
    state = _operand(state, DOT, INTERPRETED)

    first, last = _tokens_of_part(cu_seqlens, image, query_tokens, part, parts, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x = _load(query, rows, features, query_n, query_d, rows < last, F).to(tl.float32) * scale
        phi = _phi(x, PHI)
        normalizer = tl.sum(phi * key_mean[None, :], axis=1)
        # divided before the product: every operand then has the size of a weight or of a mean
        weights = _operand(phi / (normalizer + eps)[:, None], DOT, INTERPRETED)
        result = _dot(weights, state)
        result += (normalizer / (normalizer + eps))[:, None] * value_mean[None, :]
        _store(output, result, rows, columns, output_n, output_d, rows < last, V)


@triton.jit
def _query_block(
    query, query_n, query_d, output_gradient, output_n, output_d,
    rows, last, features, columns, key_mean, scale, eps,
    PHI: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Return scaled queries, their features, g, and the inverse of the normalizer; g of no token is zero."""
    real = rows < last
    x = _load(query, rows, features, query_n, query_d, real, F).to(tl.float32) * scale
    g = _load(output_gradient, rows, columns, output_n, output_d, real, V).to(tl.float32)
    phi = _phi(x, PHI)
    normalizer = tl.sum(phi * key_mean[None, :], axis=1) + eps
    inverse = 1 / tl.where(real, normalizer, 1.0)
    return x, phi, g * inverse[:, None], inverse


@triton.jit(do_not_specialize=["query_tokens", "parts"])
def query_gradient_kernel(
    query, output_gradient, cu_seqlens, totals, records, query_gradient,
    scale, eps, query_tokens, heads, parts,
    query_b, query_h, query_n, query_d,
    output_b, output_h, output_n, output_d,
    gradient_b, gradient_h, gradient_n, gradient_d,
    PHI: tl.constexpr, F: tl.constexpr, V: tl.constexpr, RECORD: tl.constexpr,
    DOT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, CHUNKS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Grid: (images x heads, parts of the queries).

    With g = output_gradient / (phi(q) z + eps) and o the output, d phi(q) = S g - z (g o), d S = phi(q)^T g and
    d z = -phi(q)^T (g o). With centered values, S and o lose z v' and v', and g (o - v') is phi(q) (S g) / (phi(q) z
    + eps) - eps (g v') / (phi(q) z + eps): the output itself is not needed.

    `FUSED`: one loop over the tokens has both products. Two loops read the tokens twice, but need fewer registers.
    """
    image_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    query += image * query_b + head * query_h
    output_gradient += image * output_b + head * output_h
    query_gradient += image * gradient_b + head * gradient_h
    totals += image_head * RECORD
    records += (image_head * parts + part) * RECORD
    features = tl.arange(0, BLOCK_F)

    first, last = _tokens_of_part(cu_seqlens, image, query_tokens, part, parts, BLOCK_N)
    key_sum_gradient = tl.zeros([BLOCK_F], tl.float32)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
        state, key_sum, value_sum, count = _sum_records(totals, 1, features, columns, F, V, RECORD)
        state, key_mean, value_mean = _centered_means(state, key_sum, value_sum, count)
        state_columns = _operand(tl.trans(state), DOT, INTERPRETED)
        state_gradient = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
        for start in range(first, last, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            x, phi, g, inverse = _query_block(
                query, query_n, query_d, output_gradient, output_n, output_d,
                rows, last, features, columns, key_mean, scale, eps, PHI, F, V,
            )  # fmt: skip
            rounded_g = _operand(g, DOT, INTERPRETED)
            phi_gradient = _dot(rounded_g, state_columns)
            along_mean = tl.sum(g * value_mean[None, :], axis=1)
            along_output = inverse * (tl.sum(phi * phi_gradient, axis=1) - eps * along_mean)
            key_sum_gradient -= tl.sum(phi * along_output[:, None], axis=0)
            phi_gradient -= along_output[:, None] * key_mean[None, :]
            x_gradient = _through_phi(phi_gradient, x, phi, PHI) * scale
            if CHUNKS > 1:
                earlier = (rows < last) & (chunk > 0)
                x_gradient += _load(query_gradient, rows, features, gradient_n, gradient_d, earlier, F)
            _store(query_gradient, x_gradient, rows, features, gradient_n, gradient_d, rows < last, F)
            if FUSED:
                state_gradient = _add_dot(state_gradient, tl.trans(_operand(phi, DOT, INTERPRETED)), rounded_g)
        if not FUSED:
            for start in range(first, last, BLOCK_N):
                _, phi, g, _ = _query_block(
                    query, query_n, query_d, output_gradient, output_n, output_d,
                    start + tl.arange(0, BLOCK_N), last, features, columns, key_mean, scale, eps, PHI, F, V,
                )  # fmt: skip
                phi, g = _operand(phi, DOT, INTERPRETED), _operand(g, DOT, INTERPRETED)
                state_gradient = _add_dot(state_gradient, tl.trans(phi), g)
        _store_record(records, state_gradient, key_sum_gradient, value_sum, count, features, columns, F, V)
        if CHUNKS > 1:
            tl.debug_barrier()  # the next chunk reads what other threads stored


@triton.jit(do_not_specialize=["tokens", "splits", "parts"])
def key_gradient_kernel(
    key, value, key_mask, cu_seqlens, totals, records, key_gradient, value_gradient,
    scale, tokens, heads, splits, parts,
    key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, mask_b, mask_n,
    key_gradient_b, key_gradient_h, key_gradient_n, key_gradient_d,
    value_gradient_b, value_gradient_h, value_gradient_n, value_gradient_d,
    PHI: tl.constexpr, F: tl.constexpr, V: tl.constexpr, RECORD: tl.constexpr,
    DOT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: (images x heads, parts of the keys). `records`, `splits` of them, are the query kernel's.

    d phi(k) = (d S v + d z) / N and d v = phi(k) d S / N. With centered values, v loses v' and d z gains d S v', which
    the query kernel has put in.
    """
    image_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    key += image * key_b + head * key_h
    value += image * value_b + head * value_h
    key_gradient += image * key_gradient_b + head * key_gradient_h
    value_gradient += image * value_gradient_b + head * value_gradient_h
    totals += image_head * RECORD
    records += image_head * splits * RECORD
    features = tl.arange(0, BLOCK_F)

    first, last = _tokens_of_part(cu_seqlens, image, tokens, part, parts, BLOCK_N)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
        state_gradient, key_sum_gradient, _, _ = _sum_records(records, splits, features, columns, F, V, RECORD)
        count = tl.maximum(tl.load(totals + F * V + F + V), 1.0)
        value_mean = tl.load(totals + F * V + F + columns, mask=columns < V, other=0.0) / count
        # summed over the columns already, hence to be added with one chunk only
        key_sum_gradient = tl.where(chunk == 0, key_sum_gradient / count, 0.0)
        state_gradient = _operand(state_gradient / count, DOT, INTERPRETED)
        for start in range(first, last, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            inside = rows < last
            real = inside
            if key_mask is not None:
                real &= tl.load(key_mask + image * mask_b + rows.to(tl.int64) * mask_n, mask=real, other=0) != 0
            x = _load(key, rows, features, key_n, key_d, real, F).to(tl.float32) * scale
            v = _load(value, rows, columns, value_n, value_d, real, V).to(tl.float32) - value_mean[None, :]
            phi = tl.where(real[:, None], _phi(x, PHI), 0.0)
            dv = _dot(_operand(phi, DOT, INTERPRETED), state_gradient)
            _store(value_gradient, dv, rows, columns, value_gradient_n, value_gradient_d, inside, V)
            phi_gradient = _dot(_operand(v, DOT, INTERPRETED), tl.trans(state_gradient))
            phi_gradient += key_sum_gradient[None, :]
            x_gradient = tl.where(real[:, None], _through_phi(phi_gradient, x, phi, PHI) * scale, 0.0)
            if CHUNKS > 1:
                earlier = inside & (chunk > 0)
                x_gradient += _load(key_gradient, rows, features, key_gradient_n, key_gradient_d, earlier, F)
            _store(key_gradient, x_gradient, rows, features, key_gradient_n, key_gradient_d, inside, F)
        if CHUNKS > 1:
            tl.debug_barrier()  # the next chunk reads what other threads stored
