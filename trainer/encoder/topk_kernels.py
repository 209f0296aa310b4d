"""The Triton kernels of exact search: which passages may be among the k best, and the scores of pairs in one order of sums.

`topk_gpu.py` and `pair_scores.py` import this file at the first launch, for it imports Triton, which not every machine has.
Their plain versions say what each kernel does.
"""

import triton
import triton.language as tl

# M queries and N passages of a tile, S lanes of a step of the product, W words of 32 passages, R pairs, L lanes of a sum
LEAST_FLOAT = tl.constexpr(-3.4028234663852886e38)
NOTHING = tl.constexpr(-(1 << 63))  # as in score_keys.py


@triton.jit
def mark_kernel(
    query_ptr,
    passage_ptr,
    least_ptr,
    norm_ptr,
    largest_ptr,
    word_ptr,
    num_queries,
    num_passages,
    width,
    num_words,
    slack,
    M: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # width is a multiple of S
):
    """Write one bit for each score: whether it reaches the limit of its query; scores live in registers only.

    Places are counted in int32: addresses take half of the instructions between two products then.
    """
    num_blocks = tl.cdiv(num_passages, N)
    num_tiles = num_blocks * tl.cdiv(num_queries, M)
    lane_S = tl.arange(0, S)
    # One loop over the tiles and steps of a program: the next tile's embeddings are on their way while this one's bits are
    # made. Neighbours share their queries, and all programs at work share the passages, which the cache holds.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_M = tile // num_blocks * M + tl.arange(0, M)
        column_N = tile % num_blocks * N + tl.arange(0, N)
        # Beyond the end the last row or column is read again, which spares a mask.
        place_M = tl.minimum(row_M, num_queries - 1)
        place_N = tl.minimum(column_N, num_passages - 1)
        score_MN = tl.zeros((M, N), tl.float32)
        for step in range(0, tl.cdiv(width, S)):
            at_S = step * S + lane_S
            query_MS = query_ptr + place_M[:, None] * width + at_S[None, :]
            passage_SN = passage_ptr + place_N[None, :] * width + at_S[:, None]
            if IS_WHOLE:
                left_MS, right_SN = tl.load(query_MS), tl.load(passage_SN)
            else:
                left_MS = tl.load(query_MS, mask=(at_S < width)[None, :], other=0.0)
                right_SN = tl.load(passage_SN, mask=(at_S < width)[:, None], other=0.0)
            score_MN = tl.dot(left_MS, right_SN, score_MN, input_precision="ieee")
        limit_M = tl.load(least_ptr + place_M) - slack * tl.load(norm_ptr + place_M) * tl.load(largest_ptr)
        limit_M = tl.where(limit_M > LEAST_FLOAT, limit_M, LEAST_FLOAT)  # also where it is not a number
        bit_N = tl.where(column_N < num_passages, 1 << (tl.arange(0, N) % 32), 0)
        bit_MN = tl.where(score_MN >= limit_M[:, None], bit_N[None, :], 0)
        word_MW = tl.sum(tl.reshape(bit_MN, (M, N // 32, 32)), 2)
        word_W = tile % num_blocks * (N // 32) + tl.arange(0, N // 32)
        address_MW = word_ptr + place_M[:, None] * num_words + word_W[None, :]
        tl.store(address_MW, word_MW, mask=(row_M < num_queries)[:, None] & (word_W < num_words)[None, :])


@triton.jit
def take_kernel(
    word_ptr,
    query_ptr,
    passage_ptr,
    id_ptr,
    key_ptr,
    count_ptr,
    over_ptr,
    width,
    num_words,
    k,
    capacity,
    W: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Put the keys of what is marked for query `program_id(0)` into its free places; of more than there are, say so alone."""
    row = tl.program_id(0).to(tl.int64)
    place_W = tl.arange(0, W)
    word_W = tl.load(word_ptr + row * num_words + place_W, mask=place_W < num_words, other=0).to(tl.uint32, bitcast=True)
    bits_W = _num_bits(word_W)
    count = tl.load(count_ptr + row)
    stop = count + tl.sum(bits_W, 0)
    tl.store(over_ptr + row, (stop > capacity).to(tl.uint8))
    if (stop > count) & (stop <= capacity):
        free = key_ptr + row * (k + capacity) + k
        slot_W = count + tl.cumsum(bits_W, 0) - bits_W
        for _ in range(0, tl.max(bits_W, 0)):  # each takes the lowest bit that is left of each word
            rest_W = word_W & (word_W - 1)
            power_W = (word_W ^ rest_W).to(tl.float32).to(tl.int32, bitcast=True) >> 23  # exponent of a power of two
            tl.store(free + slot_W, (place_W * 32 + power_W - 127).to(tl.int64), mask=word_W != 0)
            slot_W += 1
            word_W = rest_W
        tl.debug_barrier()  # other threads read what was stored
        for start in range(count, stop, R):
            slot_R = start + tl.arange(0, R)
            is_pair_R = slot_R < stop
            column_R = tl.load(free + slot_R, mask=is_pair_R, other=0)
            query_R = query_ptr + row * width + tl.zeros((R,), tl.int64)
            score_R = _sums_of_pairs(query_R, passage_ptr + column_R * width, is_pair_R, width, R, L, HALVINGS)
            id_R = tl.load(id_ptr + column_R, mask=is_pair_R, other=0)
            tl.debug_barrier()  # a key replaces a column that all have read
            tl.store(free + slot_R, _key(score_R, id_R), mask=is_pair_R)
        tl.store(count_ptr + row, stop)


@triton.jit
def pair_scores_kernel(
    query_ptr,
    passage_ptr,
    query_n_ptr,
    passage_n_ptr,
    score_ptr,
    num_pairs,
    query_width,
    passage_width,
    width,
    R: tl.constexpr,
    L: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Write the scores of R pairs; query_width, passage_width: from one row to the next."""
    pair_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_pair_R = pair_R < num_pairs
    query_R = query_ptr + tl.load(query_n_ptr + pair_R, mask=is_pair_R, other=0) * query_width
    passage_R = passage_ptr + tl.load(passage_n_ptr + pair_R, mask=is_pair_R, other=0) * passage_width
    tl.store(score_ptr + pair_R, _sums_of_pairs(query_R, passage_R, is_pair_R, width, R, L, HALVINGS), mask=is_pair_R)


@triton.jit
def _sums_of_pairs(query_R, passage_R, is_pair_R, width, R: tl.constexpr, L: tl.constexpr, HALVINGS: tl.constexpr):
    """Return the inner products of rows, (R,) float32, in the order of `pair_scores.sums_of_pairs`, whatever the layout."""
    lane_L = tl.arange(0, L)
    sum_RL = tl.zeros((R, L), tl.float32)
    for start in range(0, width, L):
        is_there_RL = is_pair_R[:, None] & (start + lane_L < width)[None, :]
        left_RL = tl.load(query_R[:, None] + (start + lane_L)[None, :], mask=is_there_RL, other=0.0)
        right_RL = tl.load(passage_R[:, None] + (start + lane_L)[None, :], mask=is_there_RL, other=0.0)
        sum_RL += left_RL.to(tl.float32) * right_RL.to(tl.float32)
    # tl.sum adds in an order that follows from a layout, which the compiler chooses; neighbours are the same everywhere.
    for halving in tl.static_range(HALVINGS):
        even_RL, odd_RL = tl.split(tl.reshape(sum_RL, (R, L >> (halving + 1), 2)))
        sum_RL = even_RL + odd_RL
    return tl.reshape(sum_RL, (R,))


@triton.jit
def _key(score_R, id_R):
    """Return what `score_keys.pack_keys` does, for ids from 0."""
    bits_R = tl.where(score_R == 0.0, 0.0, score_R).to(tl.int32, bitcast=True)
    ordered_R = bits_R ^ ((bits_R >> 31) & 0x7FFFFFFF)
    return tl.where(score_R == score_R, (ordered_R.to(tl.int64) << 32) | (0xFFFFFFFF - id_R), NOTHING)


@triton.jit
def _num_bits(word_W):
    """Return how many bits of each uint32 are set, int32."""
    word_W = word_W - ((word_W >> 1) & 0x55555555)
    word_W = (word_W & 0x33333333) + ((word_W >> 2) & 0x33333333)
    word_W = (word_W + (word_W >> 4)) & 0x0F0F0F0F
    return ((word_W * 0x01010101) >> 24).to(tl.int32)
